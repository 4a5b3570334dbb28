"""Scores solved further, tiny and real: of the scan's own queries and rows, nearer to a whole solution than EK-FAC's, and read in their place."""

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from influence_kit import score
from influence_kit.corpora.world import batch_of
from influence_kit.engine import refine
from influence_kit.findings import families as grid
from influence_kit.findings import solved
from influence_kit.findings.profiles import PlantedGrid, load_profile
from influence_kit.findings.trained import Trained
from influence_kit.runner.stages import ensure

ITERATIONS = 24


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    world = {"entities": 12, "relations": 1, "values": 4, "documents": 700, "most_supporters": 200, "queries": 3}
    world |= {"canaries": 1, "repetitions": [1, 2], "noise_share": 0.1, "held_out": 20}
    family = {"sizes": [{"width": 8, "depth": 1}], "recipe": {"batch_size": 16, "warmup_steps": 2, "evaluations": 2}}
    own = {"asked": ["fact", "canary"], "queries": 2, "sequences": 300, "iterations": ITERATIONS}
    atlas = PlantedGrid(
        world=world, family=family, scan={"fit": 60, "sequences": 90, "path": 90}, extra={"solved": own}
    )
    profile = load_profile("smoke", real_text=False).model_copy(update={"atlas": atlas})
    patch = pytest.MonkeyPatch()
    patch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    (trained,) = grid.planted_grid(profile, "atlas", **solved.chosen(profile, "atlas"))
    with pytest.warns(UserWarning, match="refine_on has 300 sequences"):
        trained = Trained(trained)
        trained.extra("solved")
    yield trained
    patch.undo()


def test_scores_are_of_the_first_queries_of_each_kind_and_of_all_that_was_scanned(run):
    further, whole = run.by("solved").scan(kind=None), run.scan(kind=None)
    kinds = run.world.queries["kind"].to_numpy(zero_copy_only=False)
    wanted = [
        query for kind, n in (("fact", 2), ("canary", 2)) for query in whole.queries[kinds[whole.queries] == kind][:n]
    ]
    assert further.queries.tolist() == sorted(wanted)
    assert np.array_equal(further.rows, whole.rows) and further.raw.shape == (4, 90)
    assert run.by("solved").scan().queries.tolist() == sorted(wanted[:2])  # facts alone, as of any scan


def test_ekfac_s_own_scores_of_these_queries_stand_beside(run):
    own, whole = run.by("solved", own=True).scan(kind=None), run.scan(kind=None)
    np.testing.assert_array_equal(own.raw, whole.raw[np.isin(whole.queries, own.queries)])
    by = solved.beside([run])
    assert list(by) == ["EK-FAC", "solved further"]
    np.testing.assert_array_equal(by["EK-FAC"][0].scan(kind=None).raw, own.raw)
    assert not np.array_equal(by["solved further"][0].scan(kind=None).raw, own.raw)


def test_they_equal_a_direct_solve_on_sequences_that_the_scan_lacks(run):
    world, further = run.world, run.by("solved").scan(kind=None)
    unseen = np.setdiff1d(np.arange(world.sequences.num_rows), further.rows)
    drawn = np.random.default_rng([run.seed, solved.SALT]).permutation(unseen)
    parts = [batch_of(world.sequences, np.sort(rows)) for rows in (drawn[:300], further.rows)]
    model, factors, asked = run.model(), run.factors(), batch_of(world.queries, further.queries)
    with pytest.warns(UserWarning):
        direct = score(model, factors, asked, parts[1], refine=ITERATIONS, refine_on=parts[0], self_influence=False)
    # `score` chooses another preconditioner: both have come near the same solution
    for ours, theirs in zip(further.raw, direct.values.numpy(), strict=True):
        assert np.corrcoef(ours, theirs)[0, 1] > 0.98


def test_what_is_left_is_told_by_size_and_what_has_not_converged_says_nothing(run, monkeypatch):
    table = solved.unsolved([run], 1.0)
    assert len(table) == 4 and (table["residual"] < table["fresh_residual"]).all() and (table["residual"] < 1).all()
    median = table["fresh_residual"].median()
    monkeypatch.setattr(solved, "CONVERGED", median + 0.01)
    assert (
        f"{median:.2f} at" in solved.told([run], 1.0).data
        and "to be believed at every size" in solved.told([run], 1.0).data
    )
    monkeypatch.setattr(solved, "CONVERGED", median - 0.01)
    assert "have not converged, and say nothing" in solved.told([run], 1.0).data


def test_a_query_whose_solve_does_not_converge_is_left_out_with_its_other_form_and_ends_no_run(
    run, monkeypatch, tmp_path
):
    stage, whole = run.planned.extra["solved", 1.0], run.by("solved").scan(kind=None)
    solve = refine.refine

    def once(model, factors, queries, *given, **known):
        if len(queries["input_ids"]) == 4:
            raise refine.Diverges([0], "query 0 does not converge")
        return solve(model, factors, queries, *given, **known)

    monkeypatch.setattr(refine, "refine", once)
    with pytest.warns(UserWarning, match="refine_on has 300 sequences"):
        solved.solved(
            stage.parameters, {n: ensure(one) for n, one in stage.inputs.items()}, tmp_path, lambda *told: None
        )
    table = pd.read_parquet(tmp_path / "solves.parquet")
    kept, lost = table[table["residual"].notna()]["query"], table[table["residual"].isna()]["query"]
    kinds = run.world.queries["kind"].to_numpy(zero_copy_only=False)
    assert sorted([*kept, *lost]) == whole.queries.tolist() and whole.queries[0] in lost.tolist()
    assert sorted(kinds[lost]) == sorted(kinds[kept]) == ["canary", "fact"]
    values = load_file(tmp_path / "scores.safetensors")
    assert values["queries"].tolist() == kept.tolist() and values["values"].shape == (2, 90)
    monkeypatch.setattr(solved, "unsolved", lambda *given: table.assign(size=1))
    assert "2 of 4 queries are left out" in solved.told([run], 1.0).data


def test_a_profile_that_solves_nothing_further_shows_nothing(run):
    plain = Trained(run.planned.__class__(**{**vars(run.planned), "extra": {}}))
    assert solved.beside([plain]) == {} and solved.told([plain]).data == ""
    assert isinstance(solved.unsolved([plain]), pd.DataFrame) and solved.unsolved([plain]).empty
