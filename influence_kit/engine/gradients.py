"""What a layer saw and what came back: inputs a [B, L, M] and output gradients g [B, L, P] of every tracked linear map.

The gradient of a sequence's summed loss with respect to a linear map's weights is D = sum_t g_t a_t^T, so these two
tensors are all that EK-FAC and scoring need: no weight gradient is ever formed. Parameters are frozen and the graph
starts at the first tracked layer, which makes a pass cheaper than a training step.

Torch, numpy, scipy and safetensors only, as in all that EK-FAC and scoring consist of: this file, `labels.py`, `blas.py`,
`factors.py`, `ekfac.py`, `directions.py`, `scores.py`, `scoring.py`, `shelf.py`, `resume.py` and `processes.py` can be
lifted out together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

MLP_PATTERN = r"(^|\.)(mlp|feed_forward|ffn)\."
HEAD_PATTERN = r"(^|\.)(lm_head|embed_out|score|output_projection)$"
WIDEST = 20_000  # an eigenbasis of this side takes 3.2 GB in float64; a 50k-wide head would take 20 GB and days


class TokenGradients(NamedTuple):
    """One layer's part of the gradient of each sequence in a batch: D_n = sum_t g[n, t] (a[n, t]; 1)^T."""

    inputs: Tensor  # a [B, L, M]; layers that read the same tensor hold the same object here
    outputs: Tensor  # g [B, L, P], the gradient of the summed loss with respect to the layer's output
    bias: bool  # whether the layer's bias is a last column of its gradient: M' = M + 1


def is_linear_map(module: nn.Module) -> bool:
    """True for `nn.Linear` and for GPT-2's `Conv1D`, a linear map that stores its weight transposed."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and module.weight.ndim == 2)  # type: ignore[return-value]


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(P, M): width of the output and of the input of a linear map, bias not counted."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def tracked_layers(model: nn.Module, layers: str = "mlp", blocks: int = 1) -> dict[str, nn.Module]:
    """The linear maps whose weights carry influence, by dotted name, in the model's order.

    `layers`: "mlp" (the paper's choice), "all" (every linear map but the output head), or a regular expression
    searched in the dotted name. `blocks`: into how many eigenbases each side will be cut.

    Raises ValueError when nothing matches, when a weight is shared with another module (its gradient would be only half of
    the truth), or when a side is too wide for an eigenbasis.
    """
    linear = {name: module for name, module in model.named_modules() if is_linear_map(module)}
    if layers == "mlp":
        chosen = {name: module for name, module in linear.items() if re.search(MLP_PATTERN, name)}
    elif layers == "all":
        chosen = {name: module for name, module in linear.items() if not re.search(HEAD_PATTERN, name)}
    else:
        try:
            chosen = {name: module for name, module in linear.items() if re.search(layers, name)}
        except re.error as error:
            raise ValueError(f"layers={layers!r} is not a regular expression: {error}") from error
    if not chosen:
        names = ", ".join(list(linear)[:6]) or "none"
        raise ValueError(f"layers={layers!r} matches no linear map; the model's first ones are: {names}")
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            first = owners.setdefault(id(weight), name)
            for tied in {first, name} & set(chosen) if first != name else ():
                raise ValueError(
                    f"layer {tied!r} shares its weight ({first!r} and {name!r} are tied): its gradient has a part that a "
                    "linear map does not see; leave it out with a narrower `layers` pattern"
                )
    for name, module in chosen.items():
        widest = math.ceil((max(shape_of(module)) + 1) / blocks)
        if widest > WIDEST:
            raise ValueError(
                f"layer {name!r} is {shape_of(module)[0]} x {shape_of(module)[1]}: one {widest} x {widest} float64 "
                f"eigenbasis takes {8 * widest**2 / 1e9:.0f} GB, and its eigendecomposition as much again; leave it out "
                "with a narrower `layers` pattern, or cut the layer into `blocks`"
            )
    return chosen


class Batch(NamedTuple):
    """Token ids [B, T], the mask [B, T] of the tokens that are targets (predicted from the position before), and L, the
    number of positions before the last target: later ones move no loss and are never computed."""

    tokens: Tensor
    loss_mask: Tensor
    length: int

    @property
    def counted(self) -> Tensor:
        """bool [B, L]: positions that can move the loss of their sequence, i.e. those with a target after them.

        Right padding and the last position fall out, whatever the padding id is.
        """
        return self.loss_mask[:, 1 : self.length + 1].flip(1).cumsum(1).flip(1) > 0


def batch_rows(total: int, batch_size: int) -> list[slice]:
    """The rows [0, total) cut into batches."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be at least 1")
    return [slice(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]


def read_batch(sequences: Mapping[str, Tensor], rows: slice, device: torch.device | str = "cpu") -> Batch:
    """Some rows of `sequences` (`input_ids` int [N, T], optional `loss_mask` bool [N, T]), as a Batch.

    Accepts any mapping or datasets.Dataset whose columns slice to arrays. Padding must be on the right.
    """
    columns = sequences.column_names if hasattr(sequences, "column_names") else list(sequences)
    tokens = _column(sequences, "input_ids", rows).long()
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(
            f"input_ids must be [N, T] with T of at least 2; rows {rows.start}.. have shape {tuple(tokens.shape)}"
        )
    mask = _column(sequences, "loss_mask", rows).bool() if "loss_mask" in columns else torch.ones_like(tokens).bool()
    if mask.shape != tokens.shape:
        raise ValueError(f"loss_mask {tuple(mask.shape)} and input_ids {tuple(tokens.shape)} must have one shape")
    mask = mask.clone()
    mask[:, 0] = False  # nothing predicts the first token
    length = int((mask.any(0) * torch.arange(mask.shape[1])).max().clamp(min=1))
    return Batch(tokens.to(device), mask.to(device), length)


def gather(sequences: Mapping[str, Tensor], rows: Iterable[int]) -> dict[str, Tensor]:
    """Single rows of a mapping or Dataset, together: `input_ids` and `loss_mask` [n, T]."""
    found = [read_batch(sequences, slice(row, row + 1)) for row in rows]
    return {"input_ids": torch.cat([b.tokens for b in found]), "loss_mask": torch.cat([b.loss_mask for b in found])}


def count(sequences: Mapping[str, Tensor]) -> int:
    """N, the number of sequences in a mapping or Dataset."""
    return len(sequences) if hasattr(sequences, "column_names") else len(sequences["input_ids"])


def _column(sequences: Mapping[str, Tensor], name: str, rows: slice) -> Tensor:
    values = sequences[rows][name] if hasattr(sequences, "column_names") else sequences[name][rows]  # type: ignore[index]
    return torch.as_tensor(values)


def sequence_losses(logits: Tensor, targets: Tensor, wanted: Tensor) -> Tensor:
    """Summed cross-entropy in nats of each sequence, [B]: logits [B, L, V], targets int64 and wanted bool [B, L]."""
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.to(logits.device).flatten(), reduction="none")
    return (losses.view(targets.shape) * wanted.to(logits.device)).sum(1)


class Recorder:
    """Records inputs and outputs of the tracked layers during a forward pass, and differentiates a loss by the outputs.

    The first tracked layer that runs is where the graph begins: nothing before it is differentiated.
    """

    def __init__(self, layers: Mapping[str, nn.Module]):
        self.layers = layers
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._handles: list = []

    def __enter__(self) -> Recorder:
        for name, module in self.layers.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()

    def _forget(self) -> None:
        self._inputs.clear()
        self._outputs.clear()

    def _hook(self, name: str):
        def record(module, arguments, output):
            if name in self._outputs:
                raise ValueError(f"layer {name!r} ran twice in one forward pass: its gradient is not one outer product")
            self._inputs[name] = arguments[0]
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            self._outputs[name] = output
            return output

        return record

    def gradients(self, loss: Tensor) -> dict[str, TokenGradients]:
        """Token gradients of every tracked layer for a loss computed from the recorded forward pass.

        Half-precision tensors are widened to float32. Raises RuntimeError if a layer did not run.
        """
        missing = set(self.layers) - set(self._outputs)
        if missing:
            raise RuntimeError(f"these tracked layers did not run in the forward pass: {', '.join(sorted(missing))}")
        grads = torch.autograd.grad(loss, [self._outputs[name] for name in self.layers])
        inputs = {id(a): _widened(a.detach()) for a in self._inputs.values()}
        found = {
            name: TokenGradients(inputs[id(self._inputs[name])], _widened(g), module.bias is not None)
            for (name, module), g in zip(self.layers.items(), grads, strict=True)
        }
        self._forget()
        return found


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def sequence_gradients(
    model: nn.Module, recorder: Recorder, batch: Batch, labels: Tensor | Callable[[Tensor], Tensor] | None = None
) -> tuple[dict[str, TokenGradients], Tensor]:
    """One forward and backward pass: every tracked layer's token gradients, and the labels int64 [B, T].

    labels: what is to be predicted, [B, T] (default: the tokens), or a function from the logits [B, L, V] of the
    counted positions to the targets int64 [B, L] (labels drawn from the model).
    """
    end = batch.length
    logits = forward(model, batch.tokens[:, :end])
    if callable(labels):
        drawn = labels(logits.detach())
        labels = batch.tokens.clone()
        labels[:, 1 : end + 1] = drawn.to(labels.device)
    elif labels is None:
        labels = batch.tokens
    losses = sequence_losses(logits, labels[:, 1 : end + 1], batch.loss_mask[:, 1 : end + 1])
    return recorder.gradients(losses.sum()), labels


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode with no parameter asking for a gradient; both are restored on leaving."""
    training = model.training
    asking = [p for p in model.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield model.eval()
    finally:
        model.train(training)
        for parameter in asking:
            parameter.requires_grad_(True)


def forward(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of a causal model for right-padded tokens [B, T]; no attention mask is needed.

    Also accepts a module that returns the logits themselves.
    """
    output = model(input_ids=tokens, use_cache=False) if hasattr(model, "config") else model(tokens)
    return _widened(output.logits if hasattr(output, "logits") else output)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes (a model: where its first layer does); for weights that `accelerate` keeps elsewhere, the
    device it moves them to."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
        for parameter in part.parameters(recurse=False):
            if not parameter.is_meta:
                return parameter.device
    return torch.device("cpu")


def dtype_of(model: nn.Module) -> torch.dtype:
    """float64 for a float64 model; float32 for every other, half precision included."""
    return torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
