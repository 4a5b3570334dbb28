"""How scores lie on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import from_numpy

from influence_kit.engine.scores import Scores


def write_scores(out: Path, scores: Scores, rows: np.ndarray, queries: np.ndarray) -> None:
    """scores.safetensors: values [Q, N] (nats at epsilon = 1), self_influence [N], query_norm [Q], rows [N] and queries [Q]
    (positions in the world's tables); layer_values [Q, N, L] where scores are by layer."""
    assert scores.self_influence is not None
    tensors = {"values": scores.values, "self_influence": scores.self_influence, "query_norm": scores.query_norm}
    tensors |= {"rows": from_numpy(rows), "queries": from_numpy(queries)}
    if scores.by_layer is not None:
        tensors["layer_values"] = scores.by_layer
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "scores.safetensors")
