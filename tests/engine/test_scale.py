"""The cost model against operations that torch counts and bytes that the engine holds and writes, and what is printed."""

import gc
import inspect
from dataclasses import replace

import pytest
import torch
from conftest import random_sequences, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from influence_kit.cli import main
from influence_kit.engine import blas, features, scale
from influence_kit.engine import fitting as ekfac
from influence_kit.engine.directions import Directions, rotated_sides
from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.index import Index, build_index
from influence_kit.engine.labels import PseudoGradients
from influence_kit.engine.layers import shape_of, tracked_layers
from influence_kit.engine.scale import Decoder, Layer, Speed, Work, decoder, describe, estimate, problems, speed_of
from influence_kit.engine.scans import score
from influence_kit.models import configure, initialise

WIDTH, DEPTH, VOCABULARY = 256, 2, 512
ASKED = Work(64, length=64, queries=6, fit=64, disk=1e9)
SIZE = Decoder(WIDTH, DEPTH, vocabulary=VOCABULARY)
SPEED = Speed(4e13, 1e-3, "given")


class Operations(TorchDispatchMode):
    """Counts as FlopCounterMode does, without the hooks by which that tells modules apart: they refuse autograd.grad."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*arguments, **(named or {}), out_val=result)
        return result


def counted(function, *arguments, **named):
    with Operations() as operations:
        result = function(*arguments, **named)
    return operations.total, result


@pytest.fixture(scope="module", autouse=True)
def all_products_by_torch():
    """Those that another library makes would not be counted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blas, "_openblas_is_faster", lambda: False)
        yield


@pytest.fixture(scope="module")
def case(all_products_by_torch):
    """A model, texts, queries, the tracked layers' shapes (P, M'), factors, and the operations of fitting them."""
    config = configure("gpt_neox", VOCABULARY, WIDTH, DEPTH, ASKED.length)
    config._attn_implementation = "eager"  # a fused one is not counted
    model = initialise(config, seed=0).eval()
    texts, queries = (random_sequences(n, ASKED.length, VOCABULARY, seed=n) for n in (ASKED.sequences, ASKED.queries))
    shapes = [(p, m + (each.bias is not None)) for each in tracked_layers(model).values() for p, m in [shape_of(each)]]
    operations, factors = counted(fit_ekfac, model, texts)
    return model, texts, queries, shapes, factors, operations


def stages_of(shapes, work=ASKED, model=SIZE):
    return {stage.name: stage for stage in estimate(shapes, model, work)}


@pytest.mark.slow
def test_operations_of_a_fit_are_those_that_torch_counts(case, monkeypatch):
    model, texts, _, shapes, _, operations = case

    def fitting():
        found = stages_of(shapes, replace(ASKED, disk=0))
        return found["fit pass"].operations + found["eigenvalue pass"].operations

    assert fitting() == pytest.approx(operations, rel=0.1)  # token gradients stay in memory
    monkeypatch.setattr(scale, "FIT_MEMORY", 0)
    monkeypatch.setattr(ekfac, "free_disk", lambda: 0)
    again, _ = counted(fit_ekfac, model, texts, memory=0)
    assert fitting() == pytest.approx(again, rel=0.1) and again > 1.1 * operations


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("self_influence", [False, True])
def test_operations_and_bytes_of_queries_and_scan_are_the_engines(case, self_influence, rank):
    model, texts, queries, shapes, factors, _ = case
    found = stages_of(shapes, replace(ASKED, self_influence=self_influence, rank=rank))
    sides = rotated_sides(factors, ASKED.queries, ASKED.sequences * (ASKED.length - 1), self_influence)
    asking, directions = counted(Directions, model, factors, queries, 0.1, sides, rank)
    whole, scores = counted(score, model, factors, queries, texts, self_influence=self_influence, rank=rank)
    assert found["queries"].operations == pytest.approx(asking, rel=0.1)
    assert found["scan"].operations == pytest.approx(whole - asking, rel=0.1)
    held = sum(each.nbytes for each in [*directions._shelf._kept.values(), *directions._bias.values()])
    beyond = stages_of(shapes, replace(ASKED, self_influence=self_influence, rank=rank, memory=0))["queries"].temporary
    assert beyond == held
    kept = scores.values.nbytes + (scores.self_influence.nbytes if self_influence else 0)
    assert found["scan"].disk == kept


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])  # of llama's maps two read one tensor
def test_bytes_of_saved_factors_are_the_engines(architecture, blocks, tmp_path):
    model = tiny_model(architecture, width=64, depth=1, dtype=torch.float32)
    texts = random_sequences(40)
    factors = fit_ekfac(model, texts, blocks=blocks)
    factors.save(tmp_path / "factors.safetensors")
    met, shapes = set(), []
    for layer in factors.layers.values():
        shapes.append(Layer(*layer.eigenvalues.shape, shared=id(layer.inputs[0]) in met))
        met.add(id(layer.inputs[0]))
    assert any(layer.shared for layer in shapes) == (architecture == "llama")
    work = Work(40, length=12, fit=40, blocks=blocks)
    expected = stages_of(shapes, work, Decoder(64, 1))["eigenvalue pass"].disk
    assert (tmp_path / "factors.safetensors").stat().st_size == pytest.approx(expected, rel=0.05)


def held() -> int:
    """Bytes of all tensors that Python knows, each storage once."""
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if type(t) is torch.Tensor
    }
    return sum(storages.values())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kept", [0, 1e9])
def test_bytes_that_a_fit_holds_are_the_engines(dtype, kept, monkeypatch):
    """Sums at the first eigendecomposition, and what there is when the second pass begins."""
    model, texts = tiny_model("gpt_neox", width=64, depth=2, dtype=getattr(torch, dtype)), random_sequences(40)
    shapes = [(p, m + 1) for each in tracked_layers(model).values() for p, m in [shape_of(each)]]
    found, decompose, read = {}, ekfac.eigh, PseudoGradients.read

    def watched_eigh(matrix):
        if not found:
            found["eigendecomposition"] = held() - before
        return decompose(matrix)

    def watched_read(self, rows):
        if len(found) == 1:
            found["eigenvalue pass"] = held() - before
        return read(self, rows)

    monkeypatch.setattr(ekfac, "eigh", watched_eigh)
    monkeypatch.setattr(PseudoGradients, "read", watched_read)
    monkeypatch.setattr(ekfac, "free_disk", lambda: 0)
    monkeypatch.setattr(scale, "FIT_MEMORY", kept)
    before = held()
    fit_ekfac(model, texts, memory=kept)
    sizes = scale._Sizes(
        shapes, size := Decoder(64, 2, vocabulary=29), work := Work(40, length=12, fit=40, dtype=dtype)
    )
    expected = stages_of(shapes, work, size)
    workspace = 24 * 257**2  # of the widest side, M' of the second layer
    first = expected["eigendecomposition"].memory - sizes.weights - workspace
    second = expected["eigenvalue pass"].memory - sizes.batch(fit_ekfac)
    assert found["eigendecomposition"] == pytest.approx(first, rel=0.05)
    assert found["eigenvalue pass"] == pytest.approx(second, rel=0.1)  # rows are aligned: 65 columns take 80


@pytest.mark.slow
def test_sides_that_a_scan_rotates_are_chosen_by_the_tokens_of_a_rank(case):
    model, _, queries, shapes, factors, _ = case
    tokens = ASKED.sequences * (ASKED.length - 1)
    all_tokens, a_ranks = (rotated_sides(factors, ASKED.queries, n, False) for n in (tokens, tokens // 16))
    assert all_tokens != a_ranks
    asking, _ = counted(Directions, model, factors, queries, 0.1, a_ranks)
    assert stages_of(shapes, replace(ASKED, ranks=16))["queries"].operations == pytest.approx(asking, rel=0.05)
    asking, _ = counted(Directions, model, factors, queries, 0.1, all_tokens)
    assert stages_of(shapes)["queries"].operations == pytest.approx(asking, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("index_bytes", "bits"), [(8192, 1), (10**6, 4), (4 * 10**6, 16)])
def test_operations_and_bytes_of_an_index_are_the_engines(case, index_bytes, bits, tmp_path, monkeypatch):
    """A pilot smaller than the corpus, and a corpus large enough that reading codes counts."""
    model, texts, _, shapes, factors, _ = case
    monkeypatch.setattr(features, "PILOT", 16)
    monkeypatch.setattr(scale, "PILOT", 16)
    monkeypatch.setattr(scale, "RESCORED", 8)
    found = stages_of(shapes, replace(ASKED, index_bytes=index_bytes))
    building, index = counted(build_index, model, factors, texts, tmp_path, bytes_per_sequence=index_bytes)
    assert index.about["bits"] == bits and (len(index.projection["kept"]) < sum(p * m for p, m in shapes)) == (
        bits == 1
    )
    assert found["index build"].operations == pytest.approx(building, rel=0.1)
    written = sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix != ".json")
    assert found["index build"].disk == pytest.approx(written, rel=0.01)
    codes = sum(path.stat().st_size for path in tmp_path.iterdir() if path.suffix in (".codes", ".norms"))
    assert found["one index query"].traffic == codes == ASKED.sequences * index.bytes_per_sequence
    one = random_sequences(1, ASKED.length, VOCABULARY, seed=9)
    asking, _ = counted(index.query, model, one, k=8)
    unpacking = 2 * ASKED.sequences * index.about["dims"]  # not a matrix product
    assert found["one index query"].operations - unpacking == pytest.approx(asking, rel=0.1)
    both, answer = counted(index.query, model, one, k=8, rescore=8, sequences=texts)
    assert len(answer.sequences.unique()) == 16
    assert found["its rescoring"].operations == pytest.approx(both - asking, rel=0.1)


def test_a_query_multiplies_every_code():
    model, work = decoder(1e9), Work(10_000_000)
    once, longer = (
        stages_of(model.shapes, replace(work, sequences=n), model)["one index query"] for n in (10**7, 10**8)
    )
    assert longer.operations - once.operations == 2 * 2 * 65472 * 9 * 10**7  # 8 * 8184 bits
    assert stages_of(model.shapes, replace(work, ranks=8), model)["one index query"] == once


def test_an_index_of_too_few_bytes_is_refused():
    with pytest.raises(ValueError, match="--index-bytes: bytes_per_sequence=9 must be at least 16"):
        stages_of(decoder(1e9).shapes, Work(1000, index_bytes=9), decoder(1e9))


def test_defaults_are_the_engines():
    engine = {**inspect.signature(fit_ekfac).parameters, **inspect.signature(score).parameters}
    assert all(getattr(Work, name) == engine[name].default for name in ("blocks", "rank", "memory"))
    assert Work.index_bytes == inspect.signature(build_index).parameters["bytes_per_sequence"].default
    assert scale.RESCORED == inspect.signature(Index.query).parameters["rescore"].default
    sizes = scale._Sizes([(8, 8)], decoder(1e6), Work(10))
    for function in (fit_ekfac, score, build_index, Index.query):
        assert sizes.batch_size(function) == inspect.signature(function).parameters["batch_size"].default
    assert scale._Sizes([(8, 8)], decoder(1e6), Work(10, batch_size=5)).batch_size(score) == 5


# --- how numbers grow


def test_passes_grow_with_sequences_and_fall_with_ranks_while_queries_do_neither():
    model, work = decoder(1e9), Work(10_000_000, rank=8)
    once = stages_of(model.shapes, work, model)
    longer = stages_of(model.shapes, replace(work, sequences=3 * work.sequences), model)
    shared = stages_of(model.shapes, replace(work, ranks=4), model)
    for name in ("scan", "index build"):
        assert longer[name].operations == pytest.approx(3 * once[name].operations, rel=1e-3)  # the pilot stays
    assert longer["scan"].disk == 3 * once["scan"].disk
    assert longer["index build"].disk - once["index build"].disk == 2 * 8200 * 10_000_000
    for name in ("fit pass", "eigenvalue pass", "scan", "index build"):
        assert shared[name].operations == pytest.approx(once[name].operations / 4, rel=1e-4)  # each keeps 1 GB
        assert shared[name].disk == once[name].disk
    assert shared["queries"].operations == once["queries"].operations == longer["queries"].operations
    beside = once["index build"].disk - 8200 * 10_000_000  # factors without labels, and which coordinates are kept
    assert beside == once["eigenvalue pass"].disk - 8 * 100_000 * 512 + 12 * 65472
    assert once["scan"].disk == 4 * 64 * 10_000_000
    assert stages_of(model.shapes, replace(work, top=100), model)["scan"].disk == 64 * 2 * 100 * 12


def test_eigendecompositions_are_shared_and_fall_with_the_square_of_blocks():
    model = Decoder(128, 8)
    cubes = {
        (ranks, blocks): stages_of(model.shapes, Work(1000, ranks=ranks, blocks=blocks), model)[
            "eigendecomposition"
        ].cubes
        for ranks, blocks in [(1, 1), (4, 1), (1, 4), (1000, 1)]
    }
    assert cubes[1, 1] == 8 * 2 * (128**3 + 512**3)
    assert cubes[4, 1] == pytest.approx(cubes[1, 1] / 4)
    assert cubes[1, 4] == pytest.approx(cubes[1, 1] / 16)
    assert cubes[1000, 1] == 512**3  # the largest is one rank's


def test_what_directions_do_not_fit_into_memory_is_read_for_every_batch():
    model, work = decoder(1e9), Work(10_000_000, disk=1e12)
    found = stages_of(model.shapes, work, model)
    beyond = 64 * 4 * sum(p * m for p, m, _ in model.shapes) - 2e9
    assert found["queries"].temporary == beyond
    assert found["scan"].traffic == pytest.approx(beyond * 10_000_000 / 32)
    (slow,) = problems(list(found.values()), model.shapes, work)
    assert slow.startswith("slow: 169.2 GB of query directions") and "--rank" in slow
    (refused,) = problems(list(found.values()), model.shapes, replace(work, disk=1e11))
    assert refused.startswith("refused: 169.2 GB of query directions beyond --memory, more than 100.0 GB of --disk")
    assert not stages_of(model.shapes, replace(work, rank=8), model)["scan"].traffic


def test_wide_layers_are_refused_with_the_blocks_that_they_need():
    model, work = decoder(2e11), Work(1000, fit=1000, rank=1, memory=1e15)
    (line,) = problems(estimate(model.shapes, model, work), model.shapes, work)
    assert (
        "refused: an eigenbasis" in line
        and line.endswith("give --blocks 3 or more")
        and line in describe(model, work, SPEED)
    )
    enough = replace(work, blocks=3)
    assert not problems(estimate(model.shapes, model, enough), model.shapes, enough)


@pytest.mark.parametrize("parameters", [5e4, 1e6, 1.2e8, 1e9, 7e10, 1e12])
def test_a_decoder_has_about_the_parameters_and_is_64_times_as_wide_as_deep(parameters):
    model = decoder(parameters)
    assert 12 * model.width**2 * model.depth == pytest.approx(parameters, rel=0.3 if parameters < 1e7 else 0.1)
    assert model.width % 64 == 0 and (parameters < 1e8 or model.width / model.depth == pytest.approx(64, rel=0.15))
    weights = sum(p * m for p, m, _ in replace(model, layers="all").shapes)
    assert weights == 12 * model.width**2 * model.depth


def test_a_model_smaller_than_one_block_is_refused():
    with pytest.raises(ValueError, match="--parameters=1000 is less than one block 64 wide: give 49152 or more"):
        decoder(1000)


# --- what is printed


def test_measured_speed_is_finite():
    speed = speed_of()
    assert 1e8 < speed.operations < 1e16 and 0 < speed.eigh < 60 and "measured" in speed.source
    assert speed_of(4e13)[:2] == (4e13, pytest.approx(30e9 / 4e13))


def test_table_has_every_stage_and_totals_that_add_up():
    model, work = decoder(1e9), Work(10_000_000, ranks=8, rank=8, disk=1e12)
    lines = describe(model, work, SPEED).splitlines()
    stages = estimate(model.shapes, model, work)
    assert [line[:18].strip() for line in lines[1:11]] == [
        *(stage.name for stage in stages), "all with scan", "all with index",
    ]  # fmt: skip
    assert f"{sum(stage.seconds(SPEED) for stage in stages[:5]) / 3600:,.1f} h" in lines[9]
    assert "96.0 GB" in lines[6] and all(max(map(len, lines[:11])) >= len(line) for line in lines[:11])
    shown = "\n".join(lines)
    assert "8,192 bytes a sequence: 65,472 of the whitened gradient's 668,860,416 coordinates, bits of each: 1" in shown
    assert "after one of 1,024 sequences that chooses" in shown
    whole = describe(model, replace(work, index_bytes=2 * 10**9), SPEED)
    assert "bits of each: 16" in whole and "that chooses" not in whole
    assert "28 blocks 1,728 wide" in "\n".join(lines) and "(given)" in "\n".join(lines)


def test_plan_of_a_size_is_printed_and_nothing_is_run(capfd):
    words = ["--sequences", "1e7", "--parameters=1e9", "--flops", "4e13", "--rank", "32", "--memory", "1e10"]
    assert main(["run", "--plan", *words]) == 0
    shown = capfd.readouterr().out
    assert main(["scale", *words]) == 0
    assert capfd.readouterr().out == shown and "10,000,000 sequences of 512 tokens" in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--plan --sequences -5 --parameters 1e9", "'--sequences': '-5' is no whole number of 1 or more: give one"),
        ("--plan --sequences 1e7 --parameters nan", "'--parameters': 'nan' is no number of 1 or more: give one"),
        ("--plan --sequences 1e7 --parameters 9", "--parameters=9 is less than one block 64 wide: give 49152 or more"),
        ("--plan --sequences 1e7 --parameters 1e9 --ranks 1.5", "'--ranks': '1.5' is no whole number"),
        ("--plan --sequences 1e7 --parameters 1e9 --length 1", "'1' is no whole number of 2 or more"),
        ("--plan --sequences 1e7 --parameters 1e9 --layers head", "'head' is not one of 'mlp', 'all'"),
        ("--plan --queries 8", "Missing option '--sequences'"),
        ("--sequences 1e7 --parameters 1e9", "--sequences is about a cost, and nothing of that size is run from here: add"),
    ],
)  # fmt: skip
def test_a_wrong_size_is_refused_in_one_line(words, told, capfd):
    assert main(["run", *words.split()]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and told in line
