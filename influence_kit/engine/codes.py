"""Vectors as a few bits a coordinate, and inner products with them.

    codes, scale = encode(mix(x), bits)                                     # x [n, d]: one row a sequence
    products(codes, fields(mix(q), bits), bits, Buffers()) * scale          # [Q, n], about q x^T

*Mixed*: coordinates that were given random signs are turned, each 64 that lie far apart, by a Hadamard matrix. That makes
them alike and so lets one scale a vector serve them all. The scale is |x|^2 / x.u (x the mixed coordinates, u their codes),
which makes a vector's product with itself exact and others unbiased over the mixing as far as mixed coordinates are Gaussian
(as in RaBitQ, Gao and Long 2024). At 16 bits nothing is mixed, and a code is the float16 number.

In a byte lie 8 / bits coordinates, 8 / bits parts of the vector apart: field i of byte j is coordinate i d bits / 8 + j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .shelf import Buffers

MIXED = 64  # side of the Hadamard matrix
STEP = {1: 1.596, 2: 0.996, 4: 0.335, 8: 0.031}  # width of a level by bits, of a standard Gaussian (Max 1960)
NORMS = 8  # bytes a sequence beside its codes: |phi|^2 and scale, float32


def layout(total: int, limit: int) -> tuple[int, int]:
    """How coordinates are kept: all in 16 bits where these fit; else all in as many of 8, 4, 2 and 1 as fit, places rounded up
    to whole blocks of MIXED; else one bit each in as many blocks as fit.

    Args:
        total: How many coordinates there are.
        limit: Bytes that they may take, norms included.

    Returns:
        (bits of a coordinate, places for coordinates).

    Raises:
        ValueError: Not one block fits.
    """
    room = 8 * (limit - NORMS)
    if room >= 16 * total:
        return 16, total
    padded = -(-total // MIXED) * MIXED
    bits = next((b for b in (8, 4, 2) if b * padded <= room), 1)
    dims = min(padded, room // bits // MIXED * MIXED)
    if dims < MIXED:
        raise ValueError(f"bytes_per_sequence={limit!r} must be at least {NORMS + MIXED // 8}: norms and {MIXED} bits")
    return bits, dims


def mix(x: Tensor) -> Tensor:
    """x [n, d] with its coordinates turned, each MIXED that lie d / MIXED apart; inner products stay."""
    return (hadamard().to(x) @ x.view(len(x), MIXED, -1)).flatten(1)


def hadamard() -> Tensor:
    """Sylvester's orthonormal matrix of side MIXED, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < MIXED:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / MIXED**0.5


def encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Vectors in a few bits a coordinate: x ~ scale (levels - middle), levels in fields of bytes.

    Args:
        x: [n, d], mixed below 16 bits.
        bits: 16, 8, 4, 2 or 1.

    Returns:
        Codes [n, d bits / 8], uint8, and scale [n].
    """
    tiny = torch.finfo(x.dtype).tiny
    if bits == 16:
        scale = x.abs().amax(1)  # the largest becomes 1, far from float16's limits
        return (x / scale.clamp(min=tiny)[:, None]).half().view(torch.uint8), scale
    step = STEP[bits] * x.square().mean(1, keepdim=True).sqrt().clamp(min=tiny)
    levels = (x / step).floor_().add_(2 ** (bits - 1)).clamp_(0, 2**bits - 1)
    along = torch.linalg.vecdot(x, levels) - (2 ** (bits - 1) - 0.5) * x.sum(1)
    parts = levels.to(torch.uint8).view(len(x), 8 // bits, -1)
    codes = torch.zeros_like(parts[:, 0])
    for i in range(8 // bits):
        codes |= parts[:, i] << (bits * i)
    return codes, x.square().sum(1) / along.clamp(min=tiny)


def fields(queries: Tensor, bits: int) -> list[Tensor]:
    """Queries [Q, d] as what each field of a code's bytes is multiplied with, [Q, bytes] each."""
    if bits == 16:
        return [queries]
    # A field is read where it stands in its byte: the query carries the power of two instead.
    parts = queries.view(len(queries), 8 // bits, -1)
    return [parts[:, i].contiguous() / 2 ** (bits * i) for i in range(8 // bits)]


def products(codes: Tensor, queries: list[Tensor], bits: int, buffers: Buffers) -> Tensor:
    """Inner products of queries with unscaled codes.

    Args:
        codes: [n, bytes], uint8.
        queries: As `fields` made them.
        bits: Of a coordinate.
        buffers: Scratch memory.

    Returns:
        [Q, n], to be multiplied by the codes' scales.
    """
    if bits == 16:
        return queries[0] @ codes.contiguous().view(torch.float16).float().T
    middle = 2 ** (bits - 1) - 0.5
    found = sum(-middle * 2 ** (bits * i) * field.sum(1, keepdim=True) for i, field in enumerate(queries))
    assert isinstance(found, Tensor)
    levels = buffers("levels", tuple(codes.shape), codes)
    numbers = buffers("numbers", tuple(codes.shape), queries[0])
    for i, field in enumerate(queries):
        torch.bitwise_and(codes, (2**bits - 1) << (bits * i), out=levels)
        found = torch.addmm(found, field, numbers.copy_(levels).T)
    return found
