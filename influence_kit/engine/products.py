"""Products with the Gauss-Newton matrix over all tracked layers, and two inverses of something near it.

    G v = mean over sequences of sum_t J_t^T (diag p_t - p_t p_t^T) J_t v         (the paper's Eq 9; one matrix over all
                                                                                 tracked layers, nothing factored)

J_t is the Jacobian of the logits at t. Tangents J v come from forward-mode differentiation and J^T from a backward pass, each
for many rows of v at once beside one forward pass. Where the logits are the head's output as it is, both end at what goes into
the head, h: there, with head W and mean m = W^T p, the middle is C = sum_v p_v (w_v - m)(w_v - m)^T, taken once for all rows of
v where that is cheaper.

Vectors over the tracked weights are flat, [Q, D]: a row a query, each layer's [P, M'] after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .factors import Factors, rotate_columns, rotate_rows
from .gradients import Recorder, TokenGradients, device_of, forward, frozen, widened
from .labels import drawn_at, uniforms
from .layers import shape_of
from .passes import before_head, costs_of, is_plain, sequence_gradients
from .processes import all_reduce, shard
from .sequences import Batch, batch_rows, count, read_batch

# Rows of v times tokens times the widest activation of a token, in numbers, at a time.
CPU_BLOCK, GPU_BLOCK = 1 << 21, 1 << 26
UNKNOWN = ("forward AD", "forward-mode", "functorch", "vmap")  # in what torch says of operations without tangents


class GaussNewton:
    """G of a sample of sequences, and G + lambda, each layer damped as EK-FAC damps it.

    Args:
        model: Any that the factors fit; its tracked layers lie on one device.
        factors: Say which layers are tracked and, by the mean of their eigenvalues, how each is damped.
        sequences: The sample, as for `read_batch`; read once.
        damping: lambda of a layer as a share of the mean of its eigenvalues.

    Attributes:
        damping_of: lambda of every weight [D].
    """

    def __init__(
        self, model: nn.Module, factors: Factors, sequences: Mapping[str, Tensor], damping: float = 0.1
    ) -> None:
        self.model, self.sequences, self.damping = model, sequences, damping
        self.factors = factors.beside(model)
        modules = dict(model.named_modules())
        self.layers = {name: modules[name] for name in self.factors.layers}
        self.shapes = {name: tuple(each.eigenvalues.shape) for name, each in self.factors.layers.items()}
        if len(found := {str(each.eigenvalues.device) for each in self.factors.layers.values()}) > 1:
            raise ValueError(
                f"Gauss-Newton products need all tracked layers on one device, not on {', '.join(sorted(found))}"
            )
        parts = [
            torch.full_like(each.eigenvalues, float(damping * each.eigenvalues.mean())).flatten()
            for each in self.factors.layers.values()
        ]
        self.damping_of = torch.cat(parts)
        self.total = count(sequences)
        self._sample = read_batch(sequences, slice(0, self.total))
        self._trunk = _Trunk(model, self._head())

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """Each layer's part [..., P, M'] of flat vectors [..., D]."""
        parts = vectors.split([p * m for p, m in self.shapes.values()], -1)
        return {name: part.unflatten(-1, shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def weights_of(self, vectors: Tensor) -> dict[str, Tensor]:
        """Flat vectors [..., D] as torch lays weights and biases out, by parameter name, layer after layer."""
        found = {}
        for name, part in self.split(vectors).items():
            layer, (_, width) = self.layers[name], shape_of(self.layers[name])
            found[f"{name}.weight"] = part[..., :width] if isinstance(layer, nn.Linear) else part[..., :width].mT
            if layer.bias is not None:
                found[f"{name}.bias"] = part[..., width]
        return found

    def flat(self, weights: Mapping[str, Tensor]) -> Tensor:
        """What `weights_of` took apart."""
        parts = []
        for name, layer in self.layers.items():
            weight = weights[f"{name}.weight"]
            weight = weight if isinstance(layer, nn.Linear) else weight.mT
            bias = [] if layer.bias is None else [weights[f"{name}.bias"][..., None]]
            parts.append(torch.cat([weight, *bias], -1).flatten(-2))
        return torch.cat(parts, -1)

    def gradients(self, sequences: Mapping[str, Tensor], batch_size: int = 32) -> Tensor:
        """Gradient of each sequence's summed loss, [N, D]."""
        with frozen(self.model), Recorder(self.layers) as recorder:
            found = []
            for rows in batch_rows(count(sequences), batch_size):
                batch = read_batch(sequences, rows, device_of(self.model))
                each = sequence_gradients(self.model, recorder, batch)[0]
                found.append(torch.cat([_outer(layer).flatten(1) for layer in each.values()], 1))
        return torch.cat(found)

    def scores(self, directions: Tensor, sequences: Mapping[str, Tensor], batch_size: int = 32) -> Tensor:
        """Inner products [Q, N] of directions [Q, D] with the sequences' gradients: influence, in nats at epsilon = 1, where
        they are (G + lambda)^-1 of query gradients."""
        parts = []
        for rows in batch_rows(count(sequences), batch_size):
            some = {name: tensor[rows] for name, tensor in sequences.items()}
            parts.append(directions @ self.gradients(some, batch_size).T)
        return torch.cat(parts, 1)

    def product(self, vectors: Tensor, rows: Sequence[int] | Tensor | None = None) -> Tensor:
        """(G + lambda) v. Ranks share the sequences.

        Args:
            vectors: v [Q, D].
            rows: Of the sample, those that G is the mean over; all by default.

        Cost of a sequence and row of v, where its forward and backward pass together are 1: 4/3 (tangents 2/3, backward 2/3).
        """
        chosen = torch.arange(self.total) if rows is None else torch.as_tensor(rows)
        total, step = torch.zeros_like(vectors), max(self._rows_at_once() // len(vectors), 1)
        for part in shard(list(chosen.split(step))):
            some = {"input_ids": self._sample.tokens[part], "loss_mask": self._sample.loss_mask[part]}
            batch = read_batch(some, slice(0, len(part)), device_of(self.model))
            total += self._summed(vectors, batch)
        all_reduce([total])
        return total / len(chosen) + self.damping_of * vectors

    def precondition(self, vectors: Tensor) -> Tensor:
        """EK-FAC's (G + lambda)^-1 v, [Q, D]."""
        solved = []
        for name, v in self.split(vectors).items():
            layer = self.factors.layers[name]
            turned = v if layer.outputs is None else rotate_rows(v, layer.outputs)
            turned = turned if layer.inputs is None else rotate_columns(turned, layer.inputs)
            turned = turned / layer.damped(self.damping)
            turned = turned if layer.inputs is None else rotate_columns(turned, layer.inputs, back=True)
            turned = turned if layer.outputs is None else rotate_rows(turned, layer.outputs, back=True)
            solved.append(turned.flatten(1))
        return torch.cat(solved, 1)

    def _head(self) -> nn.Module | None:
        """The module whose output the logits are as it is, if there is one and it is not tracked."""
        head = costs_of(self.model).head
        if head is None or any(layer is head for layer in self.layers.values()) or not self.total:
            return None
        first = Batch(*(part[:1].to(device_of(self.model)) for part in self._sample[:2]), self._sample.length)  # type: ignore[arg-type, call-arg]
        with frozen(self.model):
            return head if is_plain(self.model, head, first) else None

    def _block(self) -> int:
        return CPU_BLOCK if self.damping_of.device.type == "cpu" else GPU_BLOCK

    def _rows_at_once(self) -> int:
        """Sequences, times rows of v, whose tangents are held at a time."""
        heads = getattr(getattr(self.model, "config", None), "num_attention_heads", None) or 0
        widest = max(max(max(shape) for shape in self.shapes.values()), heads * self._sample.length)
        return max(self._block() // (widest * self._sample.length), 1)

    def _summed(self, vectors: Tensor, batch: Batch) -> Tensor:
        """Sum over a batch's sequences of J^T H J v, [Q, D]."""
        tokens, wanted = batch.tokens[:, : batch.length], batch.loss_mask[:, 1 : batch.length + 1]
        weights = {f"model.{name}": self.model.get_parameter(name).detach() for name in self.weights_of(vectors)}

        def states(weights: dict[str, Tensor]) -> Tensor:
            return functional_call(self._trunk, weights, (tokens,))

        def tangent(moved: dict[str, Tensor]) -> Tensor:
            return jvp(states, (weights,), (moved,))[1]

        found = []
        # Of the attention kernels only the plain one has forward-mode derivatives.
        with _explained(), frozen(self.model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            h, back = vjp(states, weights)  # type: ignore[misc]
            for some in vectors.split(max(self._rows_at_once() // len(tokens), 1)):
                moved = {f"model.{n}": part.to(weights[f"model.{n}"]) for n, part in self.weights_of(some).items()}
                pulled = self._curved(h, vmap(tangent)(moved), wanted)
                each = vmap(lambda one: back(one)[0])(pulled)
                found.append(self.flat({n.removeprefix("model."): g for n, g in each.items()}).to(vectors))
        return torch.cat(found)

    def _curved(self, states: Tensor, moved: Tensor, wanted: Tensor) -> Tensor:
        """The loss's second derivative with respect to the states [B, L, H], times their tangents [Q, B, L, H]; no others than
        wanted positions [B, L] have any."""
        found, head = torch.zeros_like(moved), self._trunk.head
        weight = None if head is None else widened(head.weight if isinstance(head, nn.Linear) else head.weight.T)  # type: ignore[arg-type, union-attr]
        vocabulary = states.shape[2] if weight is None else len(weight)
        folded = weight is not None and weight.shape[1] < 2 * len(moved)
        step = max(self._block() // (vocabulary * (weight.shape[1] if folded else len(moved))), 1)
        for places in wanted.flatten().nonzero().flatten().split(step):
            h, x = states.flatten(0, 1)[places], moved.flatten(1, 2)[:, places]
            p = widened(h if head is None else head(h)).softmax(-1)  # type: ignore[operator]
            if folded:
                apart = weight - (p @ weight)[:, None]  # [n, V, H]
                middle = (apart * p[..., None]).mT @ apart
                y = (x.transpose(0, 1) @ middle).transpose(0, 1)
            else:
                y = x if weight is None else x @ weight.T
                y = p * (y - (p * y).sum(-1, keepdim=True))
                y = y if weight is None else y @ weight
            found.flatten(1, 2)[:, places] = y
        return found


@contextmanager
def _explained() -> Iterator[None]:
    """Raise ValueError for a model with an operation that torch cannot differentiate forward."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not any(word in str(error) for word in UNKNOWN):
            raise
        raise ValueError(f"this model cannot be differentiated forward, which refining needs: {error}") from error


class _Trunk(nn.Module):
    """What of a model comes before its head [B, L, H], or its logits [B, L, V] where there is none."""

    def __init__(self, model: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        object.__setattr__(self, "head", head)  # a part of the model already

    def forward(self, tokens: Tensor) -> Tensor:
        if self.head is None:
            return forward(self.model, tokens)
        return before_head(self.model, self.head, tokens).view(*tokens.shape, -1)  # type: ignore[arg-type]


def sampled_gradients(
    curvature: GaussNewton, draws: int = 1, seed: int = 0, batch_size: int = 32, most: int | None = None
) -> Iterator[Tensor]:
    """Gradients [B, D] of the sample's sequences under labels drawn from the model, batch after batch, `draws` times over.

    The mean of their squares is the Fisher matrix in expectation, and that is the Gauss-Newton matrix. most: of the first so
    many sequences.
    """
    model, total = curvature.model, min(curvature.total, most or curvature.total)
    with frozen(model), Recorder(curvature.layers) as recorder:
        for draw in range(draws):
            for rows in batch_rows(total, batch_size):
                batch = read_batch(curvature.sequences, rows, device_of(model))
                chance = uniforms(seed * draws + draw, rows, batch.tokens.shape[1])[:, 1 : batch.length + 1]
                found = sequence_gradients(model, recorder, batch, drawn_at(chance))[0]
                yield torch.cat([_outer(each).flatten(1) for each in found.values()], 1)


def sampled_inverse(
    curvature: GaussNewton, draws: int = 4, seed: int = 0, batch_size: int = 32, most: int | None = None
) -> Callable[[Tensor], Tensor]:
    """v -> (F + lambda)^-1 v, [Q, D], where F is the Fisher matrix of the same sequences under `draws` sets of labels drawn from
    the model: near G + lambda, and solved at once, since F has no more than n = N draws directions (Woodbury's identity).

    Takes n D numbers and n^2 in float64 three times, n^2 D + n^3 multiplications once and 2 n D a row of v.
    """
    total = draws * min(curvature.total, most or curvature.total)
    root = curvature.damping_of.sqrt()
    E, done = root.new_empty(total, len(root)), 0
    for part in sampled_gradients(curvature, draws, seed, batch_size, most):
        E[done : done + len(part)] = part
        done += len(part)
    E.div_(root).div_(total**0.5)
    inner = torch.linalg.cholesky((E @ E.T).double() + torch.eye(total, dtype=torch.float64, device=E.device))

    def solved(vectors: Tensor) -> Tensor:
        scaled = vectors / root
        weights = torch.cholesky_solve((E @ scaled.T).double(), inner).to(E)
        return (scaled - weights.T @ E) / root

    return solved


def _outer(found: TokenGradients) -> Tensor:
    """sum_t g a^T of each sequence, [B, P, M']."""
    a, g, bias = found
    a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2) if bias else a
    return g.mT @ a
