"""EK-FAC factors: covariances -> eigenbases -> corrected eigenvalues (Grosse et al. 2023, Sec. 2.2.2 and 3.1).

For a linear map with inputs a_t [M (+1 with a bias)] and output pseudo-gradients Ds_t [P]:

    A = mean over tokens of a a^T        S = mean over tokens of Ds Ds^T        (float64 eigenbases Q_A, Q_S)
    D_n = sum_t Ds_{n,t} a_{n,t}^T       Lambda = mean over sequences of (Q_S^T D_n Q_A)^2, elementwise
    G ~ (Q_S kron Q_A) diag(Lambda) (Q_S kron Q_A)^T

Pseudo-gradients use labels drawn from the model's own output distribution: G is then the Fisher, equal to the
Gauss-Newton Hessian. The paper's printed Eq 20 and second line of Eq 21 have Q where Q^T is needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from influence_kit.gradients import (
    Batch,
    Recorder,
    TokenGradients,
    as_batches,
    count,
    forward,
    frozen,
    sequence_losses,
    shape_of,
    tracked_layers,
)

METHODS = ("ekfac", "kfac", "diagonal", "identity")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerFactors:
    """One linear map's curvature: eigenvectors Q_A [M', M'], Q_S [P, P] and eigenvalues Lambda [P, M'].

    M' = M + 1 where the layer has a bias. `None` eigenvectors stand for the identity (methods diagonal, identity).
    """

    Q_A: Tensor | None
    Q_S: Tensor | None
    eigenvalues: Tensor

    def rotate(self, gradients: TokenGradients) -> TokenGradients:
        """Token gradients in the eigenbasis: (a Q_A, g Q_S)."""
        a, g = gradients
        return TokenGradients(a if self.Q_A is None else a @ self.Q_A, g if self.Q_S is None else g @ self.Q_S)

    def sequence_gradients(self, gradients: TokenGradients) -> Tensor:
        """Rotated per-sequence gradients Q_S^T D_n Q_A, [B, P, M'].

        Costs T(M'^2 + P^2 + P M') multiplications a sequence when tokens are rotated first, P M' (T + M' + P) when
        the gradient is; the cheaper order is taken.
        """
        a, g = gradients
        tokens, m, p = a.shape[1], a.shape[2], g.shape[2]
        if self.Q_A is None or tokens * (m * m + p * p) <= p * m * (m + p):
            a, g = self.rotate(gradients)
            return g.transpose(1, 2) @ a
        return self.Q_S.T @ (g.transpose(1, 2) @ a) @ self.Q_A  # type: ignore[union-attr]

    def damped(self, damping: float) -> Tensor:
        """Lambda + damping * mean(Lambda), [P, M']: the paper's damping with damping = 0.1."""
        return self.eigenvalues + damping * self.eigenvalues.mean()


@dataclass(frozen=True)
class Factors:
    """Curvature of the tracked layers, with the pseudo-labels it was fitted on.

    `labels` int64 [N, T]: the label at t is predicted from position t - 1; column 0 is never used.
    `details`: method, layers, label kind, seed, number of sequences and of counted tokens.
    """

    layers: dict[str, LayerFactors]
    labels: Tensor | None = None
    details: dict = field(default_factory=dict)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factors:
        """A copy on another device or in another dtype."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device=device, dtype=dtype)

        layers = {n: LayerFactors(move(f.Q_A), move(f.Q_S), move(f.eigenvalues)) for n, f in self.layers.items()}  # type: ignore[arg-type]
        return Factors(layers, self.labels, self.details)

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file (byte-stable: a single JSON metadata key)."""
        from safetensors.torch import save_file

        tensors = {}
        for name, layer in self.layers.items():
            for part in ("Q_A", "Q_S", "eigenvalues"):
                if (tensor := getattr(layer, part)) is not None:
                    tensors[f"{name}/{part}"] = tensor.cpu().contiguous()
        if self.labels is not None:
            tensors["labels"] = self.labels.cpu().contiguous()
        details = json.dumps({"order": list(self.layers), **self.details}, sort_keys=True)
        temporary = Path(path).with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"influence_kit": details})
        os.replace(temporary, path)

    @staticmethod
    def load(path: str | os.PathLike) -> Factors:
        """Read what `save` wrote. Raises ValueError for a file that is something else."""
        from safetensors import safe_open

        with safe_open(str(path), "pt") as file:
            metadata = (file.metadata() or {}).get("influence_kit")
            if metadata is None:
                raise ValueError(f"{path} was not written by Factors.save: it has no influence_kit metadata")
            details = json.loads(metadata)
            names = set(file.keys())
            layers = {}
            for name in details.pop("order"):
                parts = (f"{name}/{part}" for part in ("Q_A", "Q_S", "eigenvalues"))
                layers[name] = LayerFactors(*(file.get_tensor(part) if part in names else None for part in parts))  # type: ignore[arg-type]
            labels = file.get_tensor("labels") if "labels" in names else None
        return Factors(layers, labels, details)


def uniforms(seed: int, rows: slice, length: int) -> Tensor:
    """float64 [B, T] in [0, 1): one stream a row, so that neither batch size, padding nor sharding changes a draw."""
    streams = []
    for row in range(rows.start, rows.stop):
        generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + row * 0xD1B54A32D192ED03) % 2**63)
        streams.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(streams)


def sample_labels(logits: Tensor, draws: Tensor) -> Tensor:
    """Labels int64 [B, T] drawn from softmax(logits [B, T, V]) by inverting the distribution at `draws` [B, T]."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    targets = draws.to(logits.device)[..., None] * cumulative[..., -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def fit_ekfac(
    model: nn.Module,
    sequences: Mapping[str, Tensor],
    layers: str = "mlp",
    labels: str | Tensor = "sampled",
    batch_size: int = 32,
    seed: int = 0,
    method: str = "ekfac",
    progress: Progress | None = None,
) -> Factors:
    """Fit the curvature of `model`'s tracked layers on `sequences`.

    model: any causal language model that maps token ids [B, T] to logits [B, T, V].
    sequences: `input_ids` int64 [N, T] and optional `loss_mask` bool [N, T] (True where the token is a target);
        padding on the right.
    labels: "sampled" (true Fisher; drawn once, the same for any batch size, stored in the result), "data" (the
        empirical Fisher) or int64 [N, T] given pseudo-labels (label t is predicted from position t - 1).
    method: "ekfac"; "kfac" (Lambda = mean tokens a sequence x Lambda_S kron Lambda_A); "diagonal" (second moment of the
        gradient in the parameters' own basis); "identity" (plain gradient dot products).
    progress: called with (sequences done, sequences to do) over both passes.

    Source: the paper's Eq 12-21. Raises ValueError for layers, labels or methods that do not fit the model or data.
    Cost: two forward and backward passes over `sequences`, and eigh of an M'xM' and a PxP matrix a layer in float64.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; choose one of {', '.join(METHODS)}")
    chosen = tracked_layers(model, layers)
    total = count(sequences)
    if total == 0:
        raise ValueError("no sequences to fit factors on: input_ids has no rows")
    details = {"method": method, "layers": layers, "seed": seed, "sequences": total}
    if method == "identity":
        return Factors({n: _identity(m) for n, m in chosen.items()}, None, details | {"labels": "none", "tokens": 0})
    report = progress or (lambda done, to_do: None)
    with frozen(model), Recorder(chosen) as recorder:
        A, S, drawn, tokens = _covariances(model, recorder, sequences, labels, batch_size, seed, report)
        kind = labels if isinstance(labels, str) else "given"
        details |= {"labels": kind, "tokens": tokens}
        if method == "diagonal":
            bases = {name: (None, None) for name in chosen}
        else:
            spectra = {name: (torch.linalg.eigh(A[name]), torch.linalg.eigh(S[name])) for name in chosen}
            bases = {name: (a.eigenvectors, s.eigenvectors) for name, (a, s) in spectra.items()}
        if method == "kfac":
            each = tokens / total
            eigenvalues = {
                n: each * s.eigenvalues.clamp(min=0)[:, None] * a.eigenvalues.clamp(min=0)
                for n, (a, s) in spectra.items()
            }
        else:
            eigenvalues = _second_moments(model, recorder, sequences, drawn, bases, batch_size, report)
    dtype = _working_dtype(model)
    fitted = {
        name: LayerFactors(*(None if q is None else q.to(dtype) for q in bases[name]), eigenvalues[name].to(dtype))  # type: ignore[arg-type, call-arg]
        for name in chosen
    }
    return Factors(fitted, drawn, details)


def _identity(module: nn.Module) -> LayerFactors:
    p, m = shape_of(module)
    return LayerFactors(None, None, torch.ones(p, m + (module.bias is not None), device=module.weight.device))  # type: ignore[arg-type]


def _working_dtype(model: nn.Module) -> torch.dtype:
    return torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32


def _covariances(model, recorder, sequences, labels, batch_size, seed, report):
    """First pass: draw the labels, and sum a a^T and Ds Ds^T over counted tokens in float64 sums of batch products."""
    total, device = count(sequences), next(model.parameters()).device
    A: dict[str, Tensor] = {}
    S: dict[str, Tensor] = {}
    drawn, tokens = [], 0
    for rows, batch in as_batches(sequences, batch_size, device):
        logits = forward(model, batch.tokens)
        pseudo = _labels_for(labels, rows, batch, logits.detach(), seed)
        gradients = recorder.gradients(sequence_losses(logits, pseudo, batch.loss_mask).sum())
        keep = batch.counted
        for name, (a, g) in gradients.items():
            a, g = a[keep], g[keep]
            A[name] = A.get(name, 0) + (a.T @ a).double()
            S[name] = S.get(name, 0) + (g.T @ g).double()
        tokens += int(keep.sum())
        drawn.append(pseudo.cpu())
        report(rows.stop, 2 * total)
    if tokens == 0:
        raise ValueError("loss_mask selects no target in any sequence: nothing to fit factors on")
    return (
        {n: matrix / tokens for n, matrix in A.items()},
        {n: matrix / tokens for n, matrix in S.items()},
        torch.cat(drawn),
        tokens,
    )


def _labels_for(labels: str | Tensor, rows: slice, batch: Batch, logits: Tensor, seed: int) -> Tensor:
    """Pseudo-labels int64 [B, T] of one batch."""
    if isinstance(labels, Tensor):
        if labels.ndim != 2 or len(labels) < rows.stop or labels.shape[1] != batch.tokens.shape[1]:
            raise ValueError(f"labels {tuple(labels.shape)} do not match input_ids [N, {batch.tokens.shape[1]}]")
        return labels[rows].to(batch.tokens.device)
    if labels == "data":
        return batch.tokens
    if labels != "sampled":
        raise ValueError(f"labels={labels!r} is not known; choose 'sampled', 'data' or a tensor int64 [N, T]")
    sampled = batch.tokens.clone()
    sampled[:, 1:] = sample_labels(logits[:, :-1], uniforms(seed, rows, batch.tokens.shape[1])[:, 1:])
    return sampled


def _second_moments(model, recorder, sequences, labels, bases, batch_size, report) -> dict[str, Tensor]:
    """Second pass: Lambda = mean over sequences of the squared rotated gradient, [P, M'] a layer, float64 sums."""
    total, device, dtype = count(sequences), next(model.parameters()).device, _working_dtype(model)
    rotations = {
        name: LayerFactors(*(None if q is None else q.to(dtype) for q in pair), torch.empty(0))  # type: ignore[arg-type, call-arg]
        for name, pair in bases.items()
    }
    sums: dict[str, Tensor] = {}
    for rows, batch in as_batches(sequences, batch_size, device):
        losses = sequence_losses(forward(model, batch.tokens), labels[rows].to(device), batch.loss_mask)
        for name, gradients in recorder.gradients(losses.sum()).items():
            squares = rotations[name].sequence_gradients(gradients).square().sum(0)
            sums[name] = sums.get(name, 0) + squares.double()
        report(total + rows.stop, 2 * total)
    return {name: summed / total for name, summed in sums.items()}
