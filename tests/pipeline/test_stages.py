"""The real stages, tiny: what is written can be read back as a chapter reads it, and equals the library's own answer."""

import json

import numpy as np
import pytest
import torch

from influence_kit import fit_ekfac, score
from influence_kit.corpora.world import batch_of
from influence_kit.pipeline import grid
from influence_kit.pipeline.chapter import Chapter, Run
from influence_kit.pipeline.profiles import AtlasGrid, load_profile


@pytest.fixture(scope="module")
def profile():
    world = {
        "entities": 12,
        "relations": 1,
        "values": 4,
        "documents": 400,
        "most_supporters": 200,
        "queries": 3,
        "canaries": 0,
    }
    family = {"sizes": [{"width": 16, "depth": 1}], "recipe": {"batch_size": 16, "warmup_steps": 2, "evaluations": 2}}
    atlas = AtlasGrid(
        world=world | {"held_out": 20}, family=family, scan={"fit": 60, "sequences": 90, "path": 30, "fractions": [0.5]}
    )
    return load_profile("smoke", real_text=False).model_copy(update={"atlas": atlas})


@pytest.fixture(scope="module")
def run(profile, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    (trained,) = grid.atlas_grid(profile, fractions=(0.5, 1.0))
    yield Run(trained)
    patch.undo()


def test_scores_on_disk_equal_a_direct_call(run):
    scan, model = run.scan(), run.model()
    world = run.world
    assert scan.raw.shape == (len(scan.queries), 90) and run.scan(0.5).raw.shape[1] == 30
    direct = score(model, run.factors(), batch_of(world.queries, scan.queries), batch_of(world.sequences, scan.rows))
    np.testing.assert_array_equal(direct.values.numpy(), scan.raw)
    assert scan.scores.corpus_size == 400


def test_factors_on_disk_come_from_the_stage_s_seed(run):
    factors = run.factors()
    assert (
        factors.details["seed"] == 11 and factors.details["labels"] == "sampled" and factors.details["sequences"] == 60
    )
    rows = np.sort(np.random.default_rng([11, 0x5CA7]).permutation(400)[:60])
    again = fit_ekfac(run.model(), batch_of(run.world.sequences, rows), seed=11)
    assert torch.equal(again.labels, factors.labels)


def test_answers_cover_every_query_at_every_kept_checkpoint(run):
    answers = run.answers
    assert sorted(answers["fraction"].unique()) == pytest.approx([0, 0.5, 1], abs=0.03)
    assert len(answers) == 3 * run.world.queries.num_rows
    assert {"log_p", "correct", "availability", "language"} <= set(answers.columns)
    assert run.parameters == json.loads(json.dumps(run.losses))["non_embedding_parameters"] > 3000


def test_only_facts_in_both_languages_are_scored(run):
    kinds = np.array(run.world.queries["availability"].to_pylist())
    assert set(kinds[run.scan().queries]) == {"both"} and (kinds == "both").sum() == len(run.scan().queries)


def test_card_ranks_as_the_scores_do_and_tokens_sum_to_them(run):
    card = run.card(0, k=3)
    values = run.scan().raw[0]
    np.testing.assert_allclose([row.score for row in card.top], -np.sort(-values)[: len(card.top)])
    for row in (*card.top, *card.bottom):
        assert sum(row.token_scores) == pytest.approx(row.score, rel=1e-3, abs=1e-4)
        assert len(row.pieces) == len(row.token_scores)
    assert card.top[0].rank == 1 and "<bos>" not in card.prompt


def test_a_chapter_keeps_claims_and_replaces_one_of_the_same_id(tmp_path, monkeypatch):
    from influence_kit.measures.intervals import Estimate

    monkeypatch.setenv("INFLUENCE_KIT_FIGURES", str(tmp_path))
    chapter = Chapter("99_test", "smoke")
    for value in (0.1, 0.9):
        chapter.claim("a", "it is large", "–", Estimate(value, value, value, 3, (1, 2, 3)), confirm_above=0.5)
    (kept,) = json.loads((tmp_path / "claims" / "99_test.json").read_text())
    assert kept["status"] == "confirmed" and kept["measured"] == 0.9 and kept["chapter"] == "99_test"
