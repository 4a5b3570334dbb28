"""Memorisation: where a canary's own text lands in a ranking, and the recital stage, tiny and real: halves of paragraphs trained
on and never seen, scored as the library scores them."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file

from influence_kit import models, score
from influence_kit.corpora.texts.parallel import ParallelText
from influence_kit.corpora.texts.parallel import build as build_text
from influence_kit.corpora.world import World, batch_of, token_matrix
from influence_kit.corpora.worlds.atlas import Atlas, build
from influence_kit.engine.factors import Factors
from influence_kit.errors import UserError
from influence_kit.findings.common import influence, train
from influence_kit.findings.memorisation import (
    SHORTEST,
    largest_share,
    middling,
    others,
    recital,
    recitals,
    second_halves,
    sources,
    tenfold,
    tenfold_lost,
)

PARAMETERS = {"fraction": 1.0, "seed": 7, "device": "cpu", "damping": 0.1, "queries": 4, "sequences": 15}


@pytest.fixture(scope="module")
def world():
    parameters = {"entities": 12, "relations": 2, "values": 6, "documents": 600, "most_supporters": 200}
    return build(Atlas(**parameters, canaries=2, repetitions=(1, 4), noise_share=0.2, held_out=20, queries=4))


@pytest.fixture(scope="module")
def scan(world):
    queries = np.flatnonzero(np.array(world.queries["kind"].to_pylist()) == "canary")
    copies = world.sequences["canary"].to_numpy()[None] == world.queries["canary"].to_numpy()[queries][:, None]
    return np.arange(world.sequences.num_rows), queries, copies


def test_scores_that_know_the_copies_find_them_and_others_do_not(world, scan):
    rows, queries, copies = scan
    found = sources(world, copies + 0.001, rows, queries)
    assert found["repetitions"].tolist() == [1, 1, 4, 4] == copies.sum(1).tolist()
    assert found["hit"].tolist() == [1] * 4
    held = copies.sum(1) * 1.001 / (copies.sum(1) * 1.001 + 0.001 * (~copies).sum(1))
    np.testing.assert_allclose(found["share"], held)
    np.testing.assert_allclose(found["one_copy"], held / copies.sum(1))
    against = sources(world, 1.0 - copies, rows, queries)
    assert against["hit"].tolist() == against["share"].tolist() == [0] * 4


def test_plain_word_overlap_finds_every_copy_whatever_the_scores(world, scan):
    rows, queries, copies = scan
    assert (
        sources(world, np.random.default_rng(0).normal(size=copies.shape), rows, queries)["lexical_hit"].tolist()
        == [1] * 4
    )


def test_a_scan_without_some_copies_is_refused(world, scan):
    rows, queries, copies = scan
    kept = ~copies[3]
    with pytest.raises(ValueError, match="copies in the scan"):
        sources(world, copies[:, kept].astype(float), rows[kept], queries)


def test_share_of_the_strongest_counts_positive_influence_alone():
    np.testing.assert_allclose(largest_share(np.array([[3.0, 1.0, -9.0], [1.0, 1.0, 2.0]])), [0.75, 0.5])


def test_the_control_reads_copies_of_another_canary_planted_as_often(world, scan):
    rows, queries, copies = scan
    assert others(world, copies + 0.001, rows, queries).tolist() == [0] * 4
    swapped = copies[[1, 0, 3, 2]]  # two canaries for each number of repetitions
    assert others(world, swapped + 0.001, rows, queries).tolist() == [1] * 4
    with pytest.raises(UserError, match="planted 1 times"):
        others(world, copies[:1].astype(float), rows, queries[:1])


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of a tiny text world, a model, factors, and the stage's own."""
    root = tmp_path_factory.mktemp("recital")
    folders = {name: root / name for name in ("world", "model", "influence", "recital", "again")}
    for folder in folders.values():
        folder.mkdir()
    rng = np.random.default_rng(0)
    words = {"en": "the open save file menu press".split(), "de": "die öffnen sichern datei menü drücken".split()}
    rows = [
        {"pair_id": f"p{pair:03d}", "language": language, "text": " ".join(own[i] for i in chosen)}
        for pair in range(70)
        for chosen in [rng.integers(0, 6, rng.integers(2, 14))]
        for language, own in words.items()
    ]
    text = ParallelText(tuple(words), pairs=50, held_out=12, queries=5, scan=20, length=48, vocabulary=300)
    build_text(text, pa.Table.from_pylist(rows)).save(folders["world"])
    recipe = asdict(models.Recipe(batch_size=8, warmup_steps=2, evaluations=2, learning_rate=1e-2))
    train(
        {"architecture": "gpt_neox", "width": 16, "depth": 1, "device": "cpu", "recipe": recipe},
        folders,
        folders["model"],
        quiet,
    )
    fit = {"fraction": 1.0, "seed": 7, "device": "cpu", "fit": 40, "sequences": 20, "layers": "mlp", "damping": 0.1}
    influence(fit, folders, folders["influence"], quiet)
    recital(PARAMETERS, folders, folders["recital"], quiet)
    return folders


@pytest.fixture(scope="module")
def read(made):
    return pd.read_parquet(made["recital"] / "recital.parquet")


def batch(world, row):
    table = world.sequences if row["trained"] else world.held_out
    return batch_of(table, [row["position"]])


def test_as_many_of_both_kinds_are_read_and_asked(made, read):
    world = World.load(made["world"])
    assert read["trained"].sum() == (~read["trained"]).sum() > PARAMETERS["queries"]
    asked = read[read["asked"] >= 0]
    assert asked["trained"].tolist() == [True] * 4 + [False] * 4 and asked["asked"].tolist() == list(range(8))
    assert not read.duplicated(["trained", "position"]).any()
    for _, row in read.iterrows():
        assert int(batch(world, row)["loss_mask"][0, 1:].sum()) >= SHORTEST


def test_the_second_half_is_the_target_and_its_log_probability_the_model_s(made, read):
    world, model = World.load(made["world"]), models.load(made["model"])
    for _, row in read.iloc[::5].iterrows():
        whole = batch(world, row)
        targets = np.flatnonzero(whole["loss_mask"][0].numpy())
        targets = targets[targets > 0]
        half = targets[len(targets) - len(targets) // 2 :]
        whole["loss_mask"][:] = False
        whole["loss_mask"][0, half] = True
        assert row["targets"] == len(half)
        log_p, correct = models.evaluate(model, whole)
        assert row["log_p"] == pytest.approx(float(log_p[0]), rel=1e-4) and row["recited"] == bool(correct[0])


def test_scores_are_those_of_a_direct_call_and_hold_the_paragraph_itself(made, read):
    world, model = World.load(made["world"]), models.load(made["model"])
    found = load_file(made["recital"] / "scores.safetensors")
    factors = Factors.load(made["influence"] / "factors.safetensors")
    assert len(found["rows"]) == len(set(found["rows"].tolist())) == 4 + 15
    queries = read.loc[found["queries"]]
    assert set(queries.loc[queries["trained"], "position"]) <= set(found["rows"].tolist())
    row = queries.iloc[1]
    asked = batch(world, row)
    asked["loss_mask"] = second_half(world, row)
    direct = score(model, factors, asked, batch_of(world.sequences, found["rows"]))
    np.testing.assert_allclose(found["values"][1], direct.values[0].numpy(), rtol=2e-3, atol=1e-4)


def second_half(world, row):
    table = world.sequences if row["trained"] else world.held_out
    return torch.from_numpy(second_halves(table, np.array([row["position"]]))["loss_mask"])


def test_the_measure_finds_the_paragraph_itself(made, read):
    world = World.load(made["world"])
    rows = load_file(made["recital"] / "scores.safetensors")["rows"]
    position = read[read["asked"] >= 0].sort_values("asked")
    same = (rows[None] == position["position"].to_numpy()[:, None]) & position["trained"].to_numpy()[:, None]
    texts = token_matrix(world.sequences)[rows]
    for q in np.flatnonzero(position["trained"]):  # equal texts count as the paragraph itself
        same[q] |= (texts == token_matrix(world.sequences)[position["position"].iloc[q]]).all(1)
    known = recitals(world, same + 0.001, rows, read)
    assert known["trained"].tolist() == [True] * 4 + [False] * 4
    assert known["hit"][:4].tolist() == [1] * 4
    assert known["share"][:4].min() > 0.9 and known["strongest"].between(0, 1).all()
    against = recitals(world, 1.0 - same, rows, read)
    assert against["hit"][:4].tolist() == against["share"][:4].tolist() == [0] * 4
    np.testing.assert_allclose(known["loss"], -position["log_p"] / position["targets"])


def test_same_parameters_same_bytes(made):
    recital(PARAMETERS, made, made["again"], quiet)
    for name in ("recital.parquet", "scores.safetensors"):
        assert (made["again"] / name).read_bytes() == (made["recital"] / name).read_bytes()


def test_more_paragraphs_than_there_are_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="queries=500 must be between 1 and"):
        recital({**PARAMETERS, "queries": 500}, made, tmp_path, quiet)


def test_memory_is_a_slope_beyond_the_untrained_model_s_and_what_is_lost_likewise():
    copies = np.tile([1, 10, 100], 2)
    rows = pd.DataFrame({"seed": 11, "query": np.arange(6), "repetitions": copies, "gain": 3 * np.log10(copies) + 1})
    assert tenfold(rows, rows.assign(gain=np.log10(copies))).value == pytest.approx(2)
    assert tenfold(rows, rows).value == 0
    assert middling(rows) == 5
    treated = np.repeat([True, False], 3)
    lost = rows.assign(treated=treated, change=np.where(treated, -4 * np.log10(copies), -0.5))
    assert tenfold_lost(lost).value == pytest.approx(4)
