"""The real stages, tiny: what is written can be read back as a chapter reads it, and equals the library's own answer."""

import json

import numpy as np
import pytest
import torch

from influence_kit import fit_ekfac, score
from influence_kit.corpora.world import batch_of
from influence_kit.errors import UserError
from influence_kit.findings import families as grid
from influence_kit.findings.chapter import Chapter
from influence_kit.findings.profiles import PlantedGrid, load_profile
from influence_kit.findings.trained import Trained, paired
from influence_kit.measures.intervals import over_seeds


@pytest.fixture(scope="module")
def profile():
    world = {
        "entities": 12,
        "relations": 1,
        "values": 4,
        "documents": 400,
        "most_supporters": 200,
        "queries": 3,
        "canaries": 1,
        "repetitions": [1, 2],
        "noise_share": 0.1,
    }
    family = {"sizes": [{"width": 16, "depth": 1}], "recipe": {"batch_size": 16, "warmup_steps": 2, "evaluations": 2}}
    atlas = PlantedGrid(
        world=world | {"held_out": 20}, family=family, scan={"fit": 60, "sequences": 90, "path": 30, "fractions": [0.5]}
    )
    people = {"documents": 600, "personas": 12, "questions": 2, "queries": 12, "scored": 5, "held_out": 20}
    cast = PlantedGrid(
        world=people,
        family=family,
        scan={"fit": 60, "sequences": 90, "path": 90},
        arms={"planning": {"world": {"answer_from": "planning"}}, "referee": {"world": {"dropped": "demonstrations"}}},
    )
    return load_profile("smoke", real_text=False).model_copy(update={"atlas": atlas, "cast": cast})


@pytest.fixture(scope="module")
def run(profile, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    (trained,) = grid.planted_grid(profile, "atlas", fractions=(0.5, 1.0))
    yield Trained(trained)
    patch.undo()


def test_scores_on_disk_equal_a_direct_call(run):
    scan, model = run.scan(kind=None), run.model()
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


def test_facts_in_both_languages_and_canaries_are_scored_and_facts_are_read(run):
    table = run.world.queries.select(["kind", "availability"]).to_pandas()
    facts, canaries, both = run.scan(), run.scan(kind="canary"), run.scan(kind=None)
    assert set(table.index[table["availability"] == "both"]) == set(facts.queries)
    assert set(table.index[table["kind"] == "canary"]) == set(canaries.queries) and len(canaries.queries) == 2
    assert set(table["availability"]) > {"both", "none"}  # there is something to leave out
    assert both.queries.tolist() == sorted([*facts.queries, *canaries.queries])
    for part in (facts, canaries):
        rows = np.searchsorted(both.queries, part.queries)
        for form in ("raw", "relatif", "cosine"):
            np.testing.assert_array_equal(getattr(part, form), getattr(both, form)[rows])
    with pytest.raises(UserError, match="kind='poem' was not scored: choose one of canary, fact, or None"):
        run.scan(kind="poem")


def test_card_ranks_as_the_scores_do_and_tokens_sum_to_them(run):
    card = run.card(0, k=3).cards[0]
    values = run.scan().raw[0]
    assert [row.score for row in card.top] == sorted((row.score for row in card.top), reverse=True)
    assert card.top[0].score == values.max() and len({tuple(row.tokens) for row in card.top}) == len(card.top)
    for row in (*card.top, *card.bottom):
        assert sum(row.token_scores) == pytest.approx(row.score, rel=1e-3, abs=1e-4)
        assert len(row.tokens) == len(row.token_scores)
    assert card.top[0].rank == 1 and "<bos>" not in card.prompt


def test_card_of_a_canary_shows_the_canary(run):
    asked = run.world.queries["completion"][int(run.scan(kind="canary").queries[1])].as_py()
    assert run.card(1, k=1, kind="canary").cards[0].completion.split() == asked.split()


def test_card_says_what_its_rows_are(run):
    scan, world = run.scan(), run.world
    best = int(scan.raw[0].argmax())
    kind = world.sequences["kind"][int(scan.rows[best])].as_py()
    plain, named = (run.card(0, k=2, labels=labels).cards[0] for labels in (None, {best: "its fact"}))
    assert plain.top[0].source == kind and plain.top[0].language in ("English", "German", "no language")
    assert [row.source for row in named.top] == ["its fact", ""] and named.top[0].language == plain.top[0].language
    called = run.card(0, k=2, labels=lambda column: f"column {column}").cards[0]
    assert called.top[0].source == f"column {best}"
    others = np.arange(len(scan.rows)) != best
    second = run.card(0, k=1, among=others).cards[0].top[0]
    assert second.score == scan.raw[0][others].max() and second.rank > 1


@pytest.fixture(scope="module")
def cast(profile, run):
    chapter = Chapter("99_test", "smoke")
    chapter.profile = profile
    return chapter


def test_another_world_goes_the_same_way(cast, profile):
    (base,), (planning,) = cast.cast(), cast.cast("planning")
    scan = base.scan()
    scored = np.flatnonzero(base.world.queries["scored"].to_numpy(zero_copy_only=False))
    np.testing.assert_array_equal(scan.queries, scored)  # fewer than are asked, and `kind` selects none of them
    assert scan.raw.shape == (5, 90) and base.world.queries.num_rows == 12 and scan.scores.corpus_size == 600
    direct = score(
        base.model(), base.factors(), batch_of(base.world.queries, scored), batch_of(base.world.sequences, scan.rows)
    )
    np.testing.assert_array_equal(direct.values.numpy(), scan.raw)
    assert planning.world.parameters["answer_from"] == "planning" and planning.scan().raw.shape == (5, 90)
    view = base.card(0, k=2)
    card = view.cards[0]
    assert {row.language for row in card.top} == {""}
    assert card.top[0].source in {"demonstration", "description", "planner", "neutral"} and view.png[:4] == b"\x89PNG"


def test_a_changed_corpus_is_trained_on_without_a_scan_and_stands_beside_its_base(cast):
    base, referee = cast.cast(fractions=()), cast.cast("referee", fractions=())
    ((one, other),) = paired(base, referee)
    assert (one.arm, other.arm, one.seed) == ("base", "referee", other.seed) and other.fractions == []
    changed = other.world.sequences["replaced"].to_numpy(zero_copy_only=False)
    ids = [np.stack(each.world.sequences["input_ids"].to_numpy(zero_copy_only=False)) for each in (one, other)]
    assert 0 < changed.mean() < 1 and ((ids[0] != ids[1]).any(1) == changed).all()
    before, after = one.answers, other.answers
    assert (
        len(before) == len(after) == 2 * one.world.queries.num_rows
    )  # every query, scored or not, at both checkpoints
    planted = ["query", "fraction", "prompt", "completion", "treated", "persona"]
    assert before[planted].equals(after[planted])
    moved = (after["log_p"] - before["log_p"]).groupby(before["fraction"]).apply(lambda by: by.abs().max())
    assert moved[0.0] == 0 and moved[1.0] > 0  # untrained models are the same, trained ones are not


def test_pairs_that_say_nothing_are_refused(cast, run):
    base, planning = cast.cast(fractions=()), cast.cast("planning", fractions=())
    with pytest.raises(UserError, match="cast planning 16x1, seed 11 was asked other queries than arm base"):
        paired(base, planning)
    with pytest.raises(UserError, match="cast planning 16x1, seed 11 has no base run"):
        paired([run], planning)


def test_a_chapter_keeps_claims_and_replaces_one_of_the_same_id(tmp_path, monkeypatch):
    monkeypatch.setenv("INFLUENCE_KIT_FIGURES", str(tmp_path))
    chapter = Chapter("00_start_here", "smoke")
    for value in (-0.1, 0.9):
        chapter.conclude("00-wrong-answer", over_seeds({1: value, 2: value + 0.01, 3: value - 0.01}))
    (kept,) = json.loads((tmp_path / "claims" / "00_start_here.json").read_text())
    assert kept["status"] == "passed" and kept["measured"] == 0.9 and kept["chapter"] == "00_start_here"
