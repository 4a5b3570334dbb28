"""Shared fixtures: tiny random models of three architectures, and token batches. One thread, so that bits repeat."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

ARCHITECTURES = ("gpt_neox", "llama", "gpt2")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


def tiny_model(
    architecture: str, width: int = 16, depth: int = 2, vocabulary: int = 29, context: int = 24, dtype=torch.float64
):
    """A random model far from uniform: weights scaled up, biases drawn."""
    from influence_kit.models import configure, initialise

    model = initialise(configure(architecture, vocabulary, width, depth, context), seed=3).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


def random_sequences(rows: int, length: int = 12, vocabulary: int = 29, seed: int = 0, padded: bool = False):
    """`input_ids` [rows, length] and a loss mask; padded rows keep 5 to `length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.bool)
    if padded:
        lengths = torch.randint(5, length + 1, (rows, 1), generator=generator)
        mask = torch.arange(length)[None] < lengths
    return {"input_ids": tokens, "loss_mask": mask}
