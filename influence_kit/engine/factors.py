"""What EK-FAC knows about a model's curvature, and gradients in its eigenbasis (Grosse et al. 2023, Sec. 2.2.2, 3.1).

    G ~ (Q_S kron Q_A) diag(Lambda) (Q_S kron Q_A)^T       a linear map's block, Q_S [P, P], Q_A [M', M'], Lambda [P, M']

Q_A and Q_S may be block-diagonal (the paper's Appendix A). Tokens are rotated before a sequence's gradient is formed where
that takes fewer multiplications (short sequences), the gradient is rotated otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blas import matmul
from .files import digest, load_tensors, save_tensors
from .gradients import TokenGradients, device_of, dtype_of
from .layers import shape_of
from .shelf import Buffers, aligned, aligned_width

# Orthonormal eigenvectors as columns of diagonal blocks [m_i, m_i]; the m_i sum to the side's width.
Basis = tuple[Tensor, ...]
CPU_BLOCK = 1 << 24  # elements of gradients formed at a time
GPU_BLOCK = 1 << 28


class Rotated(NamedTuple):
    """Which sides of a gradient [P, M'] are in the eigenbasis: rows by Q_S, columns by Q_A."""

    outputs: bool = True
    inputs: bool = True


EIGENBASIS = Rotated()


@dataclass(frozen=True)
class LayerFactors:
    """One linear map's curvature; M' = M + 1 where the layer has a bias.

    Args:
        inputs: Eigenvectors of A, diagonal blocks that make [M', M']; None stands for the identity (methods diagonal, identity).
        outputs: Eigenvectors of S, diagonal blocks that make [P, P], or None.
        eigenvalues: Lambda [P, M'].
    """

    inputs: Basis | None
    outputs: Basis | None
    eigenvalues: Tensor

    @property
    def Q_A(self) -> Tensor | None:
        """Eigenvectors of the activation covariance as one matrix [M', M']."""
        return None if self.inputs is None else torch.block_diag(*self.inputs)

    @property
    def Q_S(self) -> Tensor | None:
        """Eigenvectors of the gradient covariance as one matrix [P, P]."""
        return None if self.outputs is None else torch.block_diag(*self.outputs)

    def damped(self, damping: float) -> Tensor:
        """Lambda + damping * mean(Lambda), [P, M']: the paper's damping with damping = 0.1."""
        return self.eigenvalues + damping * self.eigenvalues.mean()


def _moved(
    layers: Mapping[str, LayerFactors], devices: Mapping[str, torch.device | str | None], dtype: torch.dtype | None
) -> dict[str, LayerFactors]:
    """Each layer on its device; a basis that layers share stays one where they meet."""
    met: dict[tuple, Tensor] = {}

    def move(tensor: Tensor, device: torch.device | str | None) -> Tensor:
        if (key := (id(tensor), device)) not in met:
            met[key] = aligned(tensor.to(device=device, dtype=dtype))
        return met[key]

    def basis(found: Basis | None, device: torch.device | str | None) -> Basis | None:
        return None if found is None else tuple(move(q, device) for q in found)

    return {
        n: LayerFactors(
            basis(f.inputs, devices[n]), basis(f.outputs, devices[n]), f.eigenvalues.to(device=devices[n], dtype=dtype)
        )
        for n, f in layers.items()
    }


class Rotator:
    """Forms gradients in a layer's eigenbasis, batch after batch, in the same few buffers."""

    def __init__(self, buffers: Buffers | None = None) -> None:
        self.buffers = buffers or Buffers()
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # inputs, their basis, and the rotated inputs

    def tokens(
        self, layer: LayerFactors, found: TokenGradients, rotated: Rotated = EIGENBASIS
    ) -> tuple[Tensor, Tensor]:
        """Inputs and output gradients of a batch.

        Returns:
            a [B, L, M'], with its column of ones, and g [B, L, P], each in the eigenbasis where `rotated` says so.
        """
        a, g, bias = found
        if rotated.outputs and layer.outputs is not None:
            g = self._rotate("g", g, layer.outputs, False)
        if not rotated.inputs or layer.inputs is None:
            return (torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2) if bias else a), g
        if self._last is None or self._last[0] is not a or self._last[1] is not layer.inputs[0]:
            self._last = (a, layer.inputs[0], self._rotate("a", a, layer.inputs, bias))
        return self._last[2], g

    def _rotate(self, name: str, x: Tensor, basis: Basis, bias: bool) -> Tensor:
        """x Q [B, L, M']; a last column of ones is not appended but adds the last row of Q."""
        width = sum(len(q) for q in basis)
        rows, out = x.reshape(-1, x.shape[2]), self.buffers(name, (*x.shape[:2], width), x)
        flat = out.flatten(0, 1)  # a view: rows keep their distance
        start = 0
        for i, q in enumerate(basis):
            last = bias and i == len(basis) - 1
            taken = len(q) - last
            if len(basis) == 1:
                matmul(rows, q[:taken], flat)
            else:
                flat[:, start : start + len(q)] = matmul(rows[:, start : start + taken], q[:taken])
            if last:
                flat[:, start:] += q[-1]
            start += len(q)
        return out

    def pieces(
        self, layer: LayerFactors, found: TokenGradients, rotated: Rotated = EIGENBASIS
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """The sequences' gradients, piece by piece, each valid until the next.

        Returns:
            (sequences, rows of P, gradient [b, p, W]). W is M' (M without the bias where `found` hides it) up to the next
            aligned width; columns beyond M' are zero.

        Cost: L P M' multiplications a sequence, and for each rotated side the lesser of rotating its tokens (L P^2, L M'^2)
        and rotating the gradient (P^2 M', P M'^2).
        """
        length, p = found.outputs.shape[1:]
        g_late = rotated.outputs and layer.outputs is not None and length > layer.eigenvalues.shape[1]
        a_late = rotated.inputs and layer.inputs is not None and length > p
        a, g = self.tokens(layer, found, Rotated(rotated.outputs and not g_late, rotated.inputs and not a_late))
        m = width = a.shape[2]
        wide = aligned_width(width)
        limit = CPU_BLOCK if a.device.type == "cpu" else GPU_BLOCK
        if not (g_late or a_late):
            if a.device.type == "cuda" and a.stride(1) == wide:  # which takes twice as long for an odd width
                a, m = a.as_strided((*a.shape[:2], wide), a.stride()), wide
                a[..., width:] = 0
            step = max(min(p, limit // (len(a) * m)), 1)
            for start in range(0, p, step):
                columns = g[:, :, start : start + step]
                out = self.buffers("gradient", (len(a), columns.shape[2], wide), a)
                matmul(columns.mT, a, out[..., :m])
                out[..., m:] = 0
                yield slice(None), slice(start, start + step), out
            return
        step = max(limit // (p * m), 1)
        for start in range(0, len(a), step):
            some = slice(start, start + step)
            out = self.buffers("gradient", (len(a[some]), p, wide), a)
            gradient = matmul(g[some].mT, a[some])
            if g_late:
                gradient = rotate_rows(gradient, layer.outputs)  # type: ignore[arg-type]
            if a_late:
                gradient = rotate_columns(gradient, layer.inputs)  # type: ignore[arg-type]
            out[..., :m] = gradient
            out[..., m:] = 0
            yield some, slice(None), out

    def gradients(self, layer: LayerFactors, found: TokenGradients) -> Tensor:
        """Whole gradients in the eigenbasis, [B, P, M'], valid until asked for again."""
        p, m = layer.eigenvalues.shape
        whole = self.buffers("whole", (len(found.outputs), p, m), found.outputs)
        for some, rows, piece in self.pieces(layer, found):
            whole[some, rows] = piece[..., :m]
        return whole


def rotate_rows(gradient: Tensor, basis: Basis, back: bool = False) -> Tensor:
    """Q^T D (or Q D when `back`) for D [..., P, M']."""
    if len(basis) == 1:
        return matmul(basis[0] if back else basis[0].T, gradient)
    parts = gradient.split([len(q) for q in basis], -2)
    return torch.cat([matmul(q if back else q.T, part) for q, part in zip(basis, parts, strict=True)], -2)


def rotate_columns(gradient: Tensor, basis: Basis, back: bool = False, buffers: Buffers | None = None) -> Tensor:
    """D Q (or D Q^T when `back`) for D [..., P, M']; with `buffers`, valid until asked for again."""
    if len(basis) == 1:
        wide = (buffers or Buffers())("columns", tuple(gradient.shape), gradient)
        matmul(gradient.flatten(0, -2), basis[0].T if back else basis[0], wide.flatten(0, -2))
        return wide
    parts = gradient.split([len(q) for q in basis], -1)
    return torch.cat([matmul(part, q.T if back else q) for q, part in zip(basis, parts, strict=True)], -1)


def inverse(damped: Tensor) -> Tensor:
    """1 / (Lambda + lambda) [P, W], zero in the columns that align the rows of a gradient."""
    if (wide := aligned_width(damped.shape[1])) == damped.shape[1]:
        return damped.reciprocal()
    found = damped.new_zeros(len(damped), wide)
    torch.reciprocal(damped, out=found[:, : damped.shape[1]])
    return found


@dataclass(frozen=True)
class Factors:
    """Curvature of the tracked layers, with the pseudo-labels it was fitted on.

    Args:
        layers: By dotted name.
        labels: [N, T], int64: the label at t is predicted from position t - 1; column 0 is never used.
        details: Method, layers, blocks, label kind, seed, number of sequences and of counted tokens.
    """

    layers: dict[str, LayerFactors]
    labels: Tensor | None = None
    details: dict = field(default_factory=dict)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factors:
        """A copy on another device or in another dtype."""
        return Factors(_moved(self.layers, dict.fromkeys(self.layers, device), dtype), self.labels, self.details)

    def beside(self, model: nn.Module) -> Factors:
        """A copy with every layer's factors where the model computes that layer, in the model's working dtype.

        Raises:
            ValueError: The factors belong to other layers or shapes than the model's.
        """
        modules, devices = dict(model.named_modules()), {}
        for name, layer in self.layers.items():
            if name not in modules:
                raise ValueError(f"the factors belong to another model: it has no layer {name!r}")
            p, m = shape_of(modules[name])
            expected = (p, m + (modules[name].bias is not None))
            if tuple(layer.eigenvalues.shape) != expected:
                raise ValueError(
                    f"layer {name!r}: factors are {tuple(layer.eigenvalues.shape)}, the model's are {expected}"
                )
            devices[name] = device_of(modules[name])
        return Factors(_moved(self.layers, devices, dtype_of(model)), self.labels, self.details)

    def fingerprint(self) -> str:
        """A name of 16 hex digits for the curvature, labels left out."""
        return digest(*self._content())

    def _content(self) -> tuple[list[dict], dict[str, Tensor]]:
        """What is where: for each layer the owner of its bases and their blocks; and all tensors, a shared basis once."""
        tensors: dict[str, Tensor] = {}
        owners: dict[int, str] = {}
        order = []
        for name, layer in self.layers.items():
            entry: dict = {"name": name}
            for side in ("inputs", "outputs"):
                if (basis := getattr(layer, side)) is None:
                    continue
                owner = owners.setdefault(id(basis[0]), f"{name}/{side}")
                entry[side] = [owner, len(basis)]
                if owner == f"{name}/{side}":
                    tensors |= {f"{owner}/{i}": q for i, q in enumerate(basis)}
            tensors[f"{name}/eigenvalues"] = layer.eigenvalues
            order.append(entry)
        return order, tensors

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file with a checksum; the same factors give the same bytes. A shared basis is written once."""
        order, tensors = self._content()
        if self.labels is not None:
            tensors["labels"] = self.labels
        save_tensors(path, tensors, {"order": order, **self.details})

    @staticmethod
    def load(path: str | os.PathLike) -> Factors:
        """Read what `save` wrote.

        Raises:
            ValueError: The file is something else, damaged, or of a time when no checksum was written.
        """
        tensors, details = load_tensors(path)
        if "order" not in details:
            raise ValueError(f"{path} holds no factors")
        bases: dict[str, Basis] = {}

        def basis(owner: str, blocks: int) -> Basis:
            return bases.setdefault(owner, tuple(tensors[f"{owner}/{i}"] for i in range(blocks)))

        layers = {}
        for entry in details.pop("order"):
            name = entry["name"]
            inputs, outputs = (basis(*entry[side]) if side in entry else None for side in ("inputs", "outputs"))
            layers[name] = LayerFactors(inputs, outputs, tensors[f"{name}/eigenvalues"])
        return Factors(layers, tensors.get("labels"), details)
