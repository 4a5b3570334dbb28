"""The index against exact scores; its files after kills, damage, appending and other models."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import random_sequences, tiny_model
from random_models import breaking

from influence_kit.engine import index as module
from influence_kit.engine.factors import Rotator
from influence_kit.engine.features import Features
from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.gradients import Recorder, frozen
from influence_kit.engine.index import Index, build_index, recall
from influence_kit.engine.passes import sequence_gradients
from influence_kit.engine.scans import score, top_scores
from influence_kit.engine.sequences import read_batch

WHOLE = 1 << 20  # bytes a sequence at which a tiny model's gradient is kept whole


@pytest.fixture(scope="module")
def tiny():
    model = tiny_model("gpt_neox", dtype=torch.float32)
    return model, fit_ekfac(model, random_sequences(60, seed=5))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 16)


def queries_of(rows: int = 3):
    data = random_sequences(rows, seed=11)
    data["loss_mask"][:, :-3] = False
    return data


def part(data, rows):
    return {name: tensor[rows] for name, tensor in data.items()}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def approximate_scores(index, model, queries, n):
    """All approximate scores [Q, N], from the ranking of everything."""
    found = index.query(model, queries, k=n, rescore=n)
    values = torch.zeros(len(found.values), n)
    return values.scatter_(1, found.sequences[:, 0], found.values[:, 0])


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
def test_whole_gradients_score_exactly_to_float16(tmp_path, architecture):
    model, data = tiny_model(architecture), random_sequences(40, padded=True)
    factors = fit_ekfac(model, random_sequences(30, seed=5))
    index = build_index(model, factors, data, tmp_path, bytes_per_sequence=WHOLE)
    exact = score(model, factors, queries_of(), data)
    assert index.about["bits"] == 16 and index.bytes_per_sequence == 2 * index.about["dims"] + 8
    bound = 2**-11 * exact.query_norm[:, None] * exact.self_influence.sqrt()
    error = (approximate_scores(index, model, queries_of(), 40) - exact.values).abs()
    assert (error < 2 * bound).all()
    for _, _, norms in index._shards():
        assert norms.shape[1] == 2
    kept = torch.cat([norms[:, 0] for _, _, norms in index._shards()])
    torch.testing.assert_close(kept.double(), exact.self_influence, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", ["raw", "relatif", "cosine"])
@pytest.mark.parametrize("limit", [WHOLE, 600, 100])
def test_rescored_ends_are_the_exact_ones(tiny, tmp_path, form, limit):
    model, factors = tiny
    data = random_sequences(50)
    index = build_index(model, factors, data, tmp_path, bytes_per_sequence=limit)
    exact = top_scores(model, factors, queries_of(), data, k=5, form=form)
    found = index.query(model, queries_of(), k=5, sequences=data, rescore=50, form=form)
    assert torch.equal(found.sequences, exact.sequences) and found.form == form and recall(found, exact, 5) == 1
    torch.testing.assert_close(found.values, exact.values, rtol=1e-4, atol=1e-5 * float(exact.values.abs().max()))
    quick = index.query(model, queries_of(), k=5, form=form)
    assert (quick.form, quick.approximate, found.approximate) == (form, True, False)


def test_an_answer_does_not_depend_on_what_else_is_asked(tiny, tmp_path):
    model, factors = tiny
    data, asked = random_sequences(50), queries_of(6)
    index = build_index(model, factors, data, tmp_path, bytes_per_sequence=72)
    together = index.query(model, asked, k=3, sequences=data, rescore=4)
    alone = [index.query(model, part(asked, slice(i, i + 1)), k=3, sequences=data, rescore=4) for i in range(6)]
    assert torch.equal(together.sequences, torch.cat([found.sequences for found in alone]))


def test_chosen_coordinates_are_those_of_largest_second_moment(tiny, tmp_path):
    model, factors = tiny
    data = random_sequences(40)
    index = build_index(model, factors, data, tmp_path, bytes_per_sequence=8 + 64)
    assert index.about["bits"] == 1 and index.about["dims"] == 512
    features = Features(model, factors, 0.1)
    gradients = {name: [] for name in factors.layers}
    rotator = Rotator()
    with frozen(model), Recorder({n: dict(model.named_modules())[n] for n in factors.layers}) as recorder:
        batch = read_batch(data, slice(0, 40))
        for name, found in sequence_gradients(model, recorder, batch)[0].items():
            layer = features.factors.layers[name]
            gradients[name] = rotator.gradients(layer, found).clone() / layer.damped(0.1).sqrt()
    phi = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    assert torch.equal(index.projection["kept"], phi.square().mean(0).topk(512).indices.sort().values)
    x, squares = features.project(data, slice(0, 40), index.projection, 1, 512)
    torch.testing.assert_close(squares, phi.square().sum(1), rtol=1e-4, atol=0)
    kept = phi[:, index.projection["kept"]]
    torch.testing.assert_close(x @ x.T, kept @ kept.T, rtol=1e-3, atol=1e-3 * float(kept.square().sum(1).max()))


@pytest.mark.parametrize("limit", [16, 72, 100, 300, 600, 1000, 2000, 5000, WHOLE])
def test_a_sequence_never_takes_more_than_its_bytes(tiny, tmp_path, limit):
    model, factors = tiny
    index = build_index(model, factors, random_sequences(20), tmp_path, bytes_per_sequence=limit)
    assert index.bytes_per_sequence <= limit
    written = sum(p.stat().st_size for kind in ("codes", "norms") for p in tmp_path.glob(f"*.{kind}"))
    assert written == 20 * index.bytes_per_sequence


def test_appending_equals_building_at_once(tmp_path):
    model, data = tiny_model("llama"), random_sequences(45, padded=True)
    factors = fit_ekfac(model, random_sequences(30, seed=5))
    whole = build_index(model, factors, data, tmp_path / "whole", bytes_per_sequence=1000)
    first = build_index(model, factors, part(data, slice(0, 30)), tmp_path / "first", bytes_per_sequence=1000)
    both = first.append(model, part(data, slice(30, 45)))
    assert (first.sequences, both.sequences) == (30, 45) and Index.open(tmp_path / "first").sequences == 45
    for kind in (1, 2):
        one, other = (torch.cat([shard[kind] for shard in index._shards()]) for index in (whole, both))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    found = [index.query(model, queries_of(), k=5, sequences=data, rescore=10) for index in (whole, both)]
    assert torch.equal(found[0].sequences, found[1].sequences)


@pytest.mark.parametrize("damage", ["none", "half-written", "damaged"])
def test_killed_build_goes_on_to_the_same_bytes(tiny, tmp_path, damage):
    model, factors = tiny
    data, settings = random_sequences(60), {"bytes_per_sequence": 72, "batch_size": 8}
    build_index(model, factors, data, tmp_path / "whole", **settings)

    def kill(done: int, to_do: int):
        if done > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(model, factors, data, tmp_path / "killed", progress=kill, **settings)
    with pytest.raises(ValueError, match="no finished index"):
        Index.open(tmp_path / "killed")
    kept = tmp_path / "killed" / "000000000000-000000000016.codes"
    if damage == "half-written":
        kept.write_bytes(kept.read_bytes()[:-3])
    if damage == "damaged":
        kept.write_bytes(bytes([kept.read_bytes()[0] ^ 1]) + kept.read_bytes()[1:])
    read = []
    build_index(model, factors, data, tmp_path / "killed", progress=lambda done, to_do: read.append(done), **settings)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert len(read) == (4 if damage == "none" else 6)  # of 8 batches: two whole shards were kept, or one
    before = files(tmp_path / "whole")
    build_index(model, factors, data, tmp_path / "whole", progress=lambda *_: pytest.fail("read again"), **settings)
    assert files(tmp_path / "whole") == before


def test_killed_append_leaves_the_index_and_goes_on(tiny, tmp_path):
    model, factors = tiny
    index = build_index(model, factors, random_sequences(20), tmp_path)

    def kill(done: int, to_do: int):
        if done == to_do:
            raise KeyboardInterrupt

    more = random_sequences(20, seed=9)
    with pytest.raises(KeyboardInterrupt):
        index.append(model, more, progress=kill)
    assert Index.open(tmp_path).sequences == 20
    assert index.append(model, more).sequences == 40
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.suffix in (".part", ".json")) == [".json"]


@pytest.mark.parametrize("kind", ["codes", "norms", "rows", "safetensors"])
def test_a_damaged_file_is_named(tiny, tmp_path, kind):
    model, factors = tiny
    build_index(model, factors, random_sequences(20), tmp_path)
    path = sorted(tmp_path.glob(f"*.{kind}"))[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{path.name} is not what was written: delete"):
        Index.open(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name} is missing"):
        Index.open(tmp_path, verify=False)


def test_manifest_says_what_a_reader_needs(tiny, tmp_path):
    model, factors = tiny
    build_index(model, factors, random_sequences(20), tmp_path)
    about = json.loads((tmp_path / "index.json").read_text())
    wanted = {
        "version",
        "layers",
        "bits",
        "dims",
        "seed",
        "damping",
        "model",
        "factors",
        "sequences",
        "shards",
        "files",
    }
    assert wanted <= about.keys() and {"start", "stop", "codes", "norms"} <= about["shards"][0].keys()
    assert Index.open(tmp_path).factors.labels is None
    codes = np.fromfile(tmp_path / "000000000000-000000000016.codes", np.uint8)
    assert len(codes) == 16 * about["dims"] * about["bits"] // 8


def test_another_model_is_refused(tiny, tmp_path):
    model, factors = tiny
    data = random_sequences(20)
    index = build_index(model, factors, data, tmp_path)
    other = tiny_model("gpt_neox", dtype=torch.float32)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    for call in (index.query, index.append):
        with pytest.raises(ValueError, match="another model's weights"):
            call(other, data)
    with pytest.raises(ValueError, match="holds an index of other weights: give another folder"):
        build_index(other, factors, data, tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"damping": 0.2}, "damping"),
        ({"seed": 1}, "seed"),
        ({"bytes_per_sequence": 500}, "bits, dims, bytes a sequence"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_with_another_index_is_refused(tiny, tmp_path, change, named, finished):
    model, factors = tiny
    data = random_sequences(20)
    build_index(model, factors, data, tmp_path)
    if not finished:
        (tmp_path / "index.json").rename(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=f"holds an index of other {named}: "):
        build_index(model, factors, data, tmp_path, **change)
    with pytest.raises(ValueError, match="other factors"):
        build_index(model, fit_ekfac(model, random_sequences(30, seed=6)), data, tmp_path)
    with pytest.raises(ValueError, match="other sequences"):
        build_index(model, factors, random_sequences(20, seed=3), tmp_path)


@pytest.mark.parametrize("killed", [True, False])
def test_an_index_of_other_rows_is_refused_whichever_row_differs(tiny, tmp_path, killed):
    model, factors = tiny
    data = random_sequences(300)

    def kill(done: int, to_do: int):
        if killed and done > 200:
            raise KeyboardInterrupt

    try:
        build_index(model, factors, data, tmp_path, bytes_per_sequence=72, progress=kill)
    except KeyboardInterrupt:
        pass
    other = {name: tensor.clone() for name, tensor in data.items()}
    other["input_ids"][1, 4] = (other["input_ids"][1, 4] + 1) % 29
    with pytest.raises(ValueError, match="holds an index of other sequences"):
        build_index(model, factors, other, tmp_path, bytes_per_sequence=72)
    index = build_index(model, factors, data, tmp_path, bytes_per_sequence=72)
    with pytest.raises(ValueError, match="row 1 of sequences is not the one that was indexed"):
        index.query(model, queries_of(), k=10, sequences=other, rescore=300)


def test_a_killed_append_of_other_rows_is_not_gone_on_with(tiny, tmp_path):
    model, factors = tiny
    build_index(model, factors, random_sequences(20), tmp_path)

    def kill(done: int, to_do: int):
        if done == to_do:
            raise KeyboardInterrupt

    more = random_sequences(300, seed=9)
    with pytest.raises(KeyboardInterrupt):
        Index.open(tmp_path).append(model, more, progress=kill)
    more["input_ids"][1] = 3
    Index.open(tmp_path).append(model, more)
    found = Index.open(tmp_path).query(
        model, queries_of(), k=5, sequences={n: torch.cat([t, more[n]]) for n, t in random_sequences(20).items()}
    )
    whole = {n: torch.cat([t, more[n]]) for n, t in random_sequences(20).items()}
    assert torch.equal(found.sequences, top_scores(model, factors, queries_of(), whole, k=5).sequences)


@pytest.mark.parametrize("limit", [WHOLE, 600, 72])
def test_gradients_that_are_not_finite_rank_last_and_choose_nothing(tmp_path, limit):
    model, data = breaking(tiny_model("llama", dtype=torch.float32)), random_sequences(40, vocabulary=28)
    factors = fit_ekfac(model, random_sequences(20, vocabulary=28, seed=5))
    data["input_ids"][[1, 5, 7], 2] = 28
    queries = random_sequences(2, vocabulary=28, seed=11)
    with pytest.warns(UserWarning, match=r"3 of 40 .* \(sequences 1, 5, 7\): they rank last"):
        index = build_index(model, factors, data, tmp_path, bytes_per_sequence=limit, batch_size=1)
    quick = index.query(model, queries, k=40)
    with pytest.warns(UserWarning, match="not finite"):
        exact = index.query(model, queries, k=40, sequences=data, rescore=40)
    for found in (quick, exact):
        assert (found.sequences[..., -3:] == torch.tensor([1, 5, 7])).all() and found.values[..., :-3].isfinite().all()
    with pytest.raises(ValueError, match="queries have gradients that are not finite"):
        index.query(model, {n: t[[1]] for n, t in data.items()})


def test_bad_arguments_are_refused(tiny, tmp_path):
    model, factors = tiny
    data = random_sequences(20)
    index = build_index(model, factors, data, tmp_path / "a")
    with pytest.raises(ValueError, match="query 1 has no target"):
        asked = queries_of()
        asked["loss_mask"][1] = False
        index.query(model, asked)
    with pytest.raises(ValueError, match="has 19 rows, 20 were indexed"):
        index.query(model, queries_of(), sequences=part(data, slice(0, 19)))
    with pytest.raises(ValueError, match="is not the one that was indexed"):
        index.query(model, queries_of(), sequences=part(data, torch.arange(19, -1, -1)))
    with pytest.raises(ValueError, match="form='best'"):
        index.query(model, queries_of(), form="best")
    with pytest.raises(ValueError, match="at most rescore"):
        index.query(model, queries_of(), k=10, rescore=5)
    with pytest.raises(ValueError, match="no sequences to append"):
        index.append(model, part(data, slice(0, 0)))
    for change, message in (
        ({"bytes_per_sequence": 15}, "at least 16"),
        ({"damping": -1.0}, "damping"),
    ):
        with pytest.raises(ValueError, match=message):
            build_index(model, factors, data, tmp_path / "b", **change)
    with pytest.raises(ValueError, match="no sequences to index"):
        build_index(model, factors, part(data, slice(0, 0)), tmp_path / "b")
    with pytest.raises(ValueError, match="another model"):
        build_index(tiny_model("gpt2"), factors, data, tmp_path / "b")


def test_sequences_without_a_target_have_no_influence(tiny, tmp_path):
    model, factors = tiny
    data = random_sequences(20)
    data["loss_mask"][4] = False
    for limit in (WHOLE, 500, 72):
        index = build_index(model, factors, data, tmp_path / str(limit), bytes_per_sequence=limit)
        values = approximate_scores(index, model, queries_of(), 20)
        assert values.isfinite().all() and (values[:, 4] == 0).all()


def test_datasets_are_read_like_mappings(tiny, tmp_path):
    model, factors = tiny
    data = random_sequences(20)
    rows = datasets.Dataset.from_dict({name: tensor.tolist() for name, tensor in data.items()})
    one = build_index(model, factors, data, tmp_path / "mapping", bytes_per_sequence=72)
    other = build_index(model, factors, rows, tmp_path / "dataset", bytes_per_sequence=72)
    assert files(tmp_path / "mapping") == files(tmp_path / "dataset")
    found = [index.query(model, queries_of(), k=3, sequences=s, rescore=5) for index, s in ((one, data), (other, rows))]
    assert torch.equal(found[0].sequences, found[1].sequences)


def test_a_hundred_thousand_sequences_are_read_in_bounded_memory(tiny, tmp_path, monkeypatch):
    """214 MB of codes, of which a query may hold a few tiles at a time."""
    model, factors = tiny
    monkeypatch.setattr(module, "SHARD", 4096)
    index = build_index(model, factors, random_sequences(20), tmp_path, bytes_per_sequence=4104)
    row, shards = index.about["dims"] * index.about["bits"] // 8, []
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (4096, row), np.uint8)
    norms = np.ones((4096, 2), "<f4")
    for start in range(0, 100_000, 4096):
        stop = min(start + 4096, 100_000)
        name = f"{start:012}-{stop:012}"
        (tmp_path / f"{name}.codes").write_bytes(codes[: stop - start].tobytes())
        (tmp_path / f"{name}.norms").write_bytes(norms[: stop - start].tobytes())
        (tmp_path / f"{name}.rows").write_bytes(bytes(8 * (stop - start)))
        shards.append({"name": name, "start": start, "stop": stop, "codes": "", "norms": "", "rows": ""})
    (tmp_path / "index.json").write_text(json.dumps(index.about | {"shards": shards, "sequences": 100_000}))
    index = Index.open(tmp_path, verify=False)
    tracemalloc.start()
    resident = _resident()
    found = index.query(model, queries_of(5), k=10)
    grown, peak = _resident() - resident, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.sequences >= 0).all() and found.sequences.max() < 100_000
    # One file is repeated: the first of equal rows comes first.
    assert found.sequences[:, :, 0].max() < 4096 and (found.values[:, 0, :-1] >= found.values[:, 0, 1:]).all()
    assert peak < 50e6 and grown < 100e6


def _resident() -> int:
    """Bytes of this process that are no file's pages (Linux), else 0."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
    except (OSError, StopIteration):
        return 0


def in_every_process(folder: Path) -> None:
    """What torchrun runs: the same build in every process, uneven shards included."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    module.SHARD = 16
    model, data = tiny_model("llama"), random_sequences(45, padded=True)
    index = build_index(model, fit_ekfac(model, data, seed=1), data, folder, bytes_per_sequence=72)
    more = index.append(model, random_sequences(20, seed=9))
    assert (index.sequences, more.sequences) == (45, 65)
    found = index.query(model, queries_of(), k=3, sequences=data, rescore=45)
    exact = top_scores(model, index.factors, queries_of(), data, k=3)
    assert torch.equal(found.sequences, exact.sequences)
    torch.distributed.barrier()  # a rank that leaves while another still sends aborts
    torch.distributed.destroy_process_group()
    # a worker of gloo's that lets go of a tensor while Python ends aborts the process, one time in twenty here
    sys.stdout.flush()
    os._exit(0)


def test_two_processes_write_what_one_writes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = f"{Path(__file__).parents[1]}{os.pathsep}{Path(__file__).parents[2]}"
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command += [__file__, str(tmp_path / "two")]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr[:2000]
    model, data = tiny_model("llama"), random_sequences(45, padded=True)
    two = Index.open(tmp_path / "two")
    one = build_index(model, two.factors, data, tmp_path / "one", bytes_per_sequence=72)
    one = one.append(model, random_sequences(20, seed=9))
    assert torch.equal(one.projection["kept"], two.projection["kept"])
    for kind in ("codes", "norms", "rows"):
        written = [b"".join(p.read_bytes() for p in sorted(i.folder.glob(f"*.{kind}"))) for i in (one, two)]
        assert written[0] == written[1]


if __name__ == "__main__":
    in_every_process(Path(sys.argv[1]))
