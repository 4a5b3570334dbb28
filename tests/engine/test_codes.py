"""Codes against brute force: every bit and number read one at a time."""

import pytest
import torch

from influence_kit.engine.codes import MIXED, NORMS, STEP, encode, fields, hadamard, layout, mix, products
from influence_kit.engine.shelf import Buffers

BITS = [1, 2, 4, 8, 16]


def vectors(rows: int, d: int, seed: int = 0):
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(seed))


def decoded(codes, bits: int):
    """[n, d] unscaled numbers of codes, read bit by bit as the module's docstring says they lie."""
    if bits == 16:
        return codes.numpy().view("<f2").astype("f4")
    rows, width = codes.shape
    levels = torch.zeros(rows, 8 // bits, width)
    for row in range(rows):
        for j, byte in enumerate(codes[row].tolist()):
            written = f"{byte:08b}"[::-1]
            for i in range(8 // bits):
                levels[row, i, j] = int(written[bits * i : bits * (i + 1)][::-1], 2)
    return (levels.flatten(1) - (2**bits - 1) / 2).numpy()


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_the_nearest_levels_in_the_coordinates_own_places(bits):
    """A coordinate is off by half a level at most, but where it lies beyond the outermost one."""
    x = vectors(5, 256)
    codes, scale = encode(x, bits)
    assert codes.dtype == torch.uint8 and codes.shape == (5, 256 * bits // 8)
    numbers = torch.from_numpy(decoded(codes, bits))
    if bits == 16:
        torch.testing.assert_close(numbers * scale[:, None], x, rtol=2**-11, atol=1e-7)
        return
    step = STEP[bits] * x.square().mean(1, keepdim=True).sqrt()
    within = x.abs() < step * 2 ** (bits - 1)
    assert ((x / step - numbers).abs()[within] <= 0.5 + 1e-4).all() and within.float().mean() > (0.5, 0.9)[bits > 1]
    outside = (torch.sign(x) * (2**bits - 1) / 2)[~within]
    assert torch.equal(numbers[~within], outside)


@pytest.mark.parametrize("bits", BITS)
def test_products_are_those_of_decoded_vectors(bits):
    x, q = vectors(7, 128, seed=1), vectors(3, 128, seed=2)
    codes, _ = encode(x, bits)
    expected = q @ torch.from_numpy(decoded(codes, bits)).T
    found = products(codes, fields(q, bits), bits, Buffers())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4 * float(expected.abs().max()))


def test_products_of_a_part_and_of_used_buffers_are_the_same():
    codes, _ = encode(vectors(9, 128), 2)
    asked, buffers = fields(vectors(3, 128, seed=2), 2), Buffers()
    whole = products(codes, asked, 2, buffers)
    parts = torch.cat([products(codes[:4], asked, 2, buffers), products(codes[4:], asked, 2, buffers)], 1)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("bits", BITS)
def test_a_vectors_product_with_its_own_code_is_exact(bits):
    x = vectors(6, 512)
    codes, scale = encode(x, bits)
    own = products(codes, fields(x, bits), bits, Buffers()).diagonal() * scale
    torch.testing.assert_close(own, x.square().sum(1), rtol=1e-4 if bits < 16 else 2**-11, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_zero_has_zero_products(bits):
    codes, scale = encode(torch.zeros(2, 128), bits)
    found = products(codes, fields(vectors(3, 128), bits), bits, Buffers()) * scale
    assert found.isfinite().all() and (found == 0).all()


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("bits", [8, 16])
def test_numbers_beyond_float16_are_kept(bits, size):
    x = vectors(4, 128)
    (small, scale), (expected, usual) = encode(x.double() * size, bits), encode(x.double(), bits)
    assert torch.equal(small, expected)
    torch.testing.assert_close(scale / size, usual)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_products_are_unbiased(bits):
    """Over 400 mixings the mean product with a code is the product itself within five standard errors and, for what is not
    Gaussian in blocks of 64, 1 % of the norms; a vector's product with its own code is exact."""
    generator = torch.Generator().manual_seed(0)
    x, q = torch.randn(2, 512, generator=generator) * torch.rand(512, generator=generator)
    found = []
    for _ in range(400):
        order = torch.randperm(512, generator=generator)
        signs = 2.0 * torch.randint(0, 2, (512,), generator=generator) - 1
        mixed = mix(torch.stack([x, q]).mul(signs)[:, order])
        codes, scale = encode(mixed[:1], bits)
        found.append(products(codes, fields(mixed, bits), bits, Buffers())[:, 0] * scale)
    found = torch.stack(found)
    torch.testing.assert_close(found[:, 0], x.dot(x).expand(400), rtol=1e-4, atol=0)
    error = float((found[:, 1].mean() - x.dot(q)).abs())
    assert error < 5 * float(found[:, 1].std()) / 20 + 0.01 * float(x.norm() * q.norm())


def test_mixing_turns_coordinates_that_lie_far_apart_and_keeps_products():
    x = vectors(4, 3 * MIXED).double()
    mixed = mix(x)
    torch.testing.assert_close(mixed @ mixed.T, x @ x.T)
    torch.testing.assert_close(hadamard() @ hadamard().T, torch.eye(MIXED, dtype=torch.float64))
    one = torch.zeros(1, 3 * MIXED).double()
    one[0, 4] = 1  # the second of every three
    spread = mix(one).view(MIXED, 3)
    torch.testing.assert_close(spread[:, 1].abs(), torch.full((MIXED,), MIXED**-0.5, dtype=torch.float64))
    assert (spread[:, [0, 2]] == 0).all()


@pytest.mark.parametrize("total", [1, 63, 64, 65, 1000, 4096, 5001])
def test_a_layout_is_the_most_bits_and_coordinates_that_fit(total):
    """Against trying every number of bits at every limit."""
    padded = -(-total // MIXED) * MIXED
    for limit in [16, 17, 24, 71, 72, 73, 520, 1008, 2048, 4104, NORMS + 2 * total - 1, NORMS + 2 * total, 1 << 20]:
        if limit < NORMS + MIXED // 8 and limit < NORMS + 2 * total:
            continue
        bits, dims = layout(total, limit)
        assert dims * bits // 8 + NORMS <= limit
        fitting = [b for b in (8, 4, 2, 1) if NORMS + padded * b // 8 <= limit]
        if NORMS + 2 * total <= limit:
            assert (bits, dims) == (16, total)
        elif fitting:
            assert (bits, dims) == (max(fitting), padded)
        else:
            assert bits == 1 and dims % MIXED == 0 and dims + MIXED > 8 * (limit - NORMS) >= dims


@pytest.mark.parametrize("limit", [15, 8, 0, -3])
def test_a_limit_below_one_block_is_refused(limit):
    with pytest.raises(ValueError, match=f"bytes_per_sequence={limit} must be at least 16: norms and 64 bits"):
        layout(1000, limit)
