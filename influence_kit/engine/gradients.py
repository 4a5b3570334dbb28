"""What a layer saw and what came back: inputs a [B, L, M] and output gradients g [B, L, P] of every tracked linear map.

The gradient of a sequence's summed loss with respect to a linear map's weights is D = sum_t g_t a_t^T, so these two
tensors are all that EK-FAC and scoring need: no weight gradient is ever formed. Parameters are frozen and the graph
starts at the first tracked layer, which makes a pass cheaper than a training step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blas import attention, by_onednn, is_large


class TokenGradients(NamedTuple):
    """One layer's part of the gradient of each sequence in a batch: D_n = sum_t g[n, t] (a[n, t]; 1)^T."""

    inputs: Tensor  # a [B, L, M]; layers that read the same tensor hold the same object here
    outputs: Tensor  # g [B, L, P], the gradient of the summed loss with respect to the layer's output
    bias: bool  # whether the layer's bias is a last column of its gradient: M' = M + 1


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
        self.costs: object = None  # what `passes` found out about the model
        self.plain: bool | None = None
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
        self.forget()

    def forget(self) -> None:
        """Let go of a forward pass that is not to be differentiated."""
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

    def gradients(self, loss: Tensor, shape: tuple[int, int]) -> dict[str, TokenGradients]:
        """Token gradients of every tracked layer for a loss computed from the recorded forward pass.

        Half-precision tensors are widened to float32; layers that saw [B L, M] (OPT's MLP) are seen as [B, L, M].

        Args:
            loss: A number.
            shape: (B, L) of the tokens that went in.

        Raises:
            ValueError: A layer did not run, or did not run once for every token.
        """
        if missing := sorted(set(self.layers) - set(self._outputs)):
            raise ValueError(f"these tracked layers did not run in the forward pass: {', '.join(missing)}")
        for name, output in self._outputs.items():
            if output.shape[:-1] not in (shape, (math.prod(shape),)):
                raise ValueError(
                    f"layer {name!r} gave {list(output.shape)} for {shape[0]} sequences of {shape[1]} tokens, not one row a "
                    "token (experts that see some of the tokens do so): leave it out with a narrower `layers` pattern"
                )
        grads = torch.autograd.grad(loss, [self._outputs[name] for name in self.layers])
        inputs = {id(a): widened(a.detach()).view(*shape, a.shape[-1]) for a in self._inputs.values()}
        found = {
            name: TokenGradients(
                inputs[id(self._inputs[name])], widened(g).view(*shape, g.shape[-1]), module.bias is not None
            )
            for (name, module), g in zip(self.layers.items(), grads, strict=True)
        }
        self.forget()
        return found


def widened(tensor: Tensor) -> Tensor:
    """Half precision in float32, everything else as it is."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode with no parameter asking for a gradient, autograd switched on; every module's and
    parameter's own state is restored on leaving.

    Raises:
        ValueError: `torch.inference_mode` is on, or was when the model was made: it keeps nothing to differentiate.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode keeps nothing to differentiate: call this outside of it")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError("the model's weights were made under torch.inference_mode: load it outside of it")
    training = [module for module in model.modules() if module.training]
    asking = [p for p in model.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad(), by_onednn(is_large(model)):
            yield model.eval()
    finally:
        for module in training:
            module.training = True
        for parameter in asking:
            parameter.requires_grad_(True)


def forward(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of a causal model for right-padded tokens [B, T]; no attention mask is needed.

    Also accepts a module that returns the logits themselves.
    """
    with attention(tokens.shape[-1]):
        output = model(input_ids=tokens, use_cache=False) if hasattr(model, "config") else model(tokens)
    return widened(output.logits if hasattr(output, "logits") else output)


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
