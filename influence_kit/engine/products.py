"""Products with the Gauss-Newton matrix over all tracked layers, and two inverses of something near it.

    G v = mean over sequences of sum_t J_t^T (diag p_t - p_t p_t^T) J_t v         (the paper's Eq 9; one matrix over all
                                                                                 tracked layers, nothing factored)

J_t is the Jacobian of the logits at t. J^T comes from a backward pass, J v from the backward pass's own derivative, each for many
rows of v at once beside one forward pass, which is kept for the next product where memory has room. Where the logits are the
head's output as it is, both end at what goes into the head, h: there, with head W and mean m = W^T p, the middle is
C = sum_v p_v (w_v - m)(w_v - m)^T, taken once where h is narrow.

Vectors over the tracked weights are flat, [Q, D]: a row a query, each layer's [P, M'] after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from .blas import matmul
from .factors import Factors, rotate_columns, rotate_rows
from .gradients import Recorder, TokenGradients, device_of, forward, frozen, widened
from .labels import drawn_at, uniforms
from .layers import shape_of
from .passes import before_head, costs_of, is_plain, room, sequence_gradients
from .processes import all_reduce, shard
from .sequences import Batch, batch_rows, count, read_batch

ROWS = 16  # of v, taken at once
CPU_BLOCK, GPU_BLOCK = 1 << 20, 1 << 26  # numbers of the widest activation, of so many rows, at a time
FOLDED = 64  # widest h for which C [H, H] is formed: V H^2 multiplications once a token, not 2 V H for every v
ELEMENTWISE = (nn.GELU, nn.SiLU, nn.ReLU, nn.Tanh, nn.Sigmoid)
UNKNOWN = (
    "twice",
    "is not implemented",
    "not have been used",
    "functorch",
    "vmap",
)  # in what torch says of operations that it cannot
HELD = 3  # bytes that a pass and its backward pass hold, over those of a pass alone


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
        self._trunk, self._tried = _Trunk(model, self._head()), False
        self._passes: dict[int, _Pass] = {}
        self._room = float(room(device_of(model)).activations)

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
            parts.append(matmul(directions, self.gradients(some, batch_size).T))
        return torch.cat(parts, 1)

    def product(self, vectors: Tensor, rows: Sequence[int] | Tensor | None = None) -> Tensor:
        """(G + lambda) v. Ranks share the sequences.

        Args:
            vectors: v [Q, D].
            rows: Of the sample, those that G is the mean over; all by default.

        Cost of a sequence and row of v, where its forward and backward pass together are 1: 4/3 (tangents 2/3, backward 2/3).
        """
        chosen = torch.arange(self.total) if rows is None else torch.as_tensor(rows)
        total = torch.zeros_like(vectors)
        for number, part in shard(list(enumerate(chosen.split(self._at_once())))):
            one = self._passes.get(number) if rows is None else None
            one = one or self._pass(part)
            if rows is None and number not in self._passes and one.held <= self._room:
                self._passes[number], self._room = one, self._room - one.held
            for some in batch_rows(len(vectors), ROWS):
                total[some] += self.flat(one(self.weights_of(vectors[some])))
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

    def _at_once(self) -> int:
        """Sequences in a pass, so that ROWS tangents of their widest activation fit."""
        heads = getattr(getattr(self.model, "config", None), "num_attention_heads", None) or 0
        widest = max(max(max(shape) for shape in self.shapes.values()), heads * self._sample.length)
        return max(_block(self.damping_of.device) // (widest * self._sample.length * ROWS), 1)

    def _pass(self, rows: Tensor) -> _Pass:
        some = {"input_ids": self._sample.tokens[rows], "loss_mask": self._sample.loss_mask[rows]}
        batch = read_batch(some, slice(0, len(rows)), device_of(self.model))
        weights = {name: self.model.get_parameter(name) for name in self.weights_of(self.damping_of)}
        found = _Pass(self._trunk, weights, batch)
        if not self._tried:
            found.try_out()
            self._tried = True
        return found


def _block(device: torch.device) -> int:
    return CPU_BLOCK if device.type == "cpu" else GPU_BLOCK


class _Pass:
    """A batch's forward pass and backward pass, from which J^T H J v comes for any v. held: its bytes, about."""

    def __init__(self, trunk: _Trunk, weights: Mapping[str, Tensor], batch: Batch) -> None:
        tokens, wanted = batch.tokens[:, : batch.length], batch.loss_mask[:, 1 : batch.length + 1]
        self.weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        placed = {f"model.{name}": weight for name, weight in self.weights.items()}
        # The fused attention kernels have no second derivatives.
        with _explained(), frozen(trunk.model), _straightened(trunk.model), sdpa_kernel(SDPBackend.MATH):
            self.states = functional_call(trunk, placed, (tokens,))
            self.pulled = torch.zeros_like(self.states, requires_grad=True)
            own = list(self.weights.values())
            self.gradients = torch.autograd.grad(self.states, own, self.pulled, create_graph=True)
        self.places, self.head = wanted.flatten().nonzero().flatten(), trunk.head
        self.held = HELD * tokens.numel() * costs_of(trunk.model).token
        self.middle: Tensor | None = None
        with torch.no_grad():
            if trunk.head is not None and self.states.shape[-1] <= FOLDED:
                self.middle = torch.cat([self._middle(some) for some in self._split(self.states.shape[-1])])
                self.held += self.middle.nbytes

    @torch.no_grad()
    def try_out(self) -> None:
        """Raise ValueError unless u J v is v J^T u for random u and v: where a backward pass hides its own derivative, J v lacks a
        part without a word."""
        generator = torch.Generator().manual_seed(0)
        u, *v = (
            torch.randn(each.shape, generator=generator).to(each) for each in (self.pulled, *self.weights.values())
        )
        with _explained():
            (moved,) = torch.autograd.grad(self.gradients, self.pulled, v, retain_graph=True)
            back = torch.autograd.grad(self.states, list(self.weights.values()), u, retain_graph=True)
            apart = (moved * u).sum() - sum((a * b).sum() for a, b in zip(v, back, strict=True))
            if not abs(float(apart)) <= 0.01 * float(moved.norm()):
                raise RuntimeError("an operation in it cannot be differentiated twice")

    @torch.no_grad()
    def __call__(self, moved: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum over the batch's sequences of J^T H J v, by parameter name [Q, ...], for v laid out so."""
        given = [moved[name].to(weight) for name, weight in self.weights.items()]
        back = partial(torch.autograd.grad, is_grads_batched=True, retain_graph=True)
        with _explained():
            (tangents,) = back(self.gradients, self.pulled, given)
            found = back(self.states, list(self.weights.values()), self._curved(tangents))
        return {name: each.to(moved[name]) for name, each in zip(self.weights, found, strict=True)}

    def _split(self, each: int) -> tuple[Tensor, ...]:
        """The places of targets, some at a time, where each takes so many numbers a token of the vocabulary."""
        vocabulary = self.states.shape[-1] if self.head is None else shape_of(self.head)[0]
        return self.places.split(max(_block(self.places.device) // (vocabulary * each), 1))

    def _probabilities(self, places: Tensor) -> Tensor:
        h = self.states.detach().flatten(0, 1)[places]
        return widened(h if self.head is None else self.head(h)).softmax(-1)

    def _middle(self, places: Tensor) -> Tensor:
        """C [n, H, H]."""
        assert self.head is not None
        p, weight = self._probabilities(places), _weight(self.head)
        apart = weight - (p @ weight)[:, None]  # [n, V, H]
        return (apart * p[..., None]).mT @ apart

    def _curved(self, tangents: Tensor) -> Tensor:
        """The loss's second derivative with respect to the states, times their tangents [Q, B, L, H]: nothing but at targets."""
        found = torch.zeros_like(tangents)
        flat, put = tangents.flatten(1, 2), found.flatten(1, 2)
        if self.middle is not None:
            put[:, self.places] = (flat[:, self.places].transpose(0, 1) @ self.middle).transpose(0, 1)
            return found
        for places in self._split(len(flat)):
            p, y = self._probabilities(places), flat[:, places]
            y = y if self.head is None else y @ _weight(self.head).T
            y = p * (y - (p * y).sum(-1, keepdim=True))
            put[:, places] = y if self.head is None else y @ _weight(self.head)
        return found


def _weight(head: nn.Module) -> Tensor:
    """W [V, H] of a linear map."""
    return widened(head.weight if isinstance(head, nn.Linear) else head.weight.T).detach()  # type: ignore[arg-type]


@contextmanager
def _straightened(model: nn.Module) -> Iterator[None]:
    """Activations and layer norms as their tangents where they are, y + J (x - x0): the same numbers and first derivatives, but
    nothing is computed again for every v."""
    with ExitStack() as undo:
        for module in model.modules():
            if "forward" in vars(module) or getattr(module, "inplace", False):
                continue
            if isinstance(module, ELEMENTWISE) or type(module).__module__ == "transformers.activations":
                module.forward = partial(_line, module.forward)
            elif type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
                module.forward = partial(_normed, module, module.forward)  # type: ignore[method-assign]
            else:
                continue
            undo.callback(delattr, module, "forward")
        yield


def _line(plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    at = x.detach().requires_grad_()
    y = plain(at)
    return y.detach() + torch.autograd.grad(y.sum(), at)[0] * (x - x.detach())


def _normed(module: nn.LayerNorm, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    at = x.detach()
    apart = at - at.mean(-1, keepdim=True)
    scale = (apart.square().mean(-1, keepdim=True) + module.eps).rsqrt()
    unit, moved = apart * scale, x - at
    mean = moved.new_full((moved.shape[-1], 1), -1 / moved.shape[-1])  # a product's derivative takes less than a mean's
    moved = moved + moved @ mean + unit * ((unit * moved) @ mean)
    return plain(at) + moved * (scale if module.weight is None else scale * module.weight)


@contextmanager
def _explained() -> Iterator[None]:
    """Raise ValueError for a model with an operation that torch cannot differentiate twice."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or not any(word in str(error) for word in UNKNOWN):
            raise
        raise ValueError(
            f"this model cannot be differentiated twice, which Gauss-Newton products need: {error}"
        ) from error


class _Trunk(nn.Module):
    """What of a model comes before its head [B, L, H], or its logits [B, L, V] where there is none."""

    head: nn.Module | None

    def __init__(self, model: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        object.__setattr__(self, "head", head)  # a part of the model already

    def forward(self, tokens: Tensor) -> Tensor:
        if self.head is None:
            return forward(self.model, tokens)
        return before_head(self.model, self.head, tokens).view(*tokens.shape, -1)


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
    inner = torch.eye(total, dtype=torch.float64, device=E.device)
    for rows in batch_rows(total, 256):  # the lower triangle, which is all that is read
        inner[rows.start :, rows] += matmul(E[rows.start :], E[rows].T)
    inner = torch.linalg.cholesky(inner)

    def solved(vectors: Tensor) -> Tensor:
        scaled = vectors / root
        weights = torch.cholesky_solve(matmul(E, scaled.T).double(), inner).to(E)
        return (scaled - matmul(weights.T, E)) / root

    return solved


def _outer(found: TokenGradients) -> Tensor:
    """sum_t g a^T of each sequence, [B, P, M']."""
    a, g, bias = found
    a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2) if bias else a
    return matmul(g.mT, a)
