"""Maths and code: planted rankings give the numbers that can be told by hand."""

import numpy as np
import pytest

from influence_kit.corpora.worlds.procedures import TIERS, VERBS, Procedures, build, tiers
from influence_kit.errors import UserError
from influence_kit.findings.maths_and_code import contrasts, shuffled_within, within_and_between

SMALL = {"names": 6, "things": 6, "variables": 8, "documents": 4000, "queries": 80, "held_out": 50, "scored": 60}


@pytest.fixture(scope="module")
def scan():
    world = build(Procedures(**SMALL))
    rows, queries = np.arange(1, 4000, 2), np.flatnonzero(world.queries["scored"].to_numpy(zero_copy_only=False))
    return world, rows, queries, {name: member[queries] for name, member in tiers(world, rows).items()}


def noise(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_scores_that_know_nothing_tell_nothing_apart(scan):
    world, rows, queries, _ = scan
    found = contrasts(world, noise((len(queries), len(rows))), rows, queries, top=0.5)
    assert found[["auc", "auc_answer", "auc_nothing"]].mean().to_numpy() == pytest.approx(0.5, abs=0.02)
    assert found[["same", "names", *TIERS]].mean().to_numpy() == pytest.approx(1, abs=0.1)
    assert set(found.kind) == {"maths", "code"} and set(found.procedure[found.kind == "maths"]) == set(VERBS)


def test_procedure_names_and_answers_are_told_apart(scan):
    world, rows, queries, members = scan
    base = noise((len(queries), len(rows))) * 0.01
    by_procedure = contrasts(world, base + members["SA"] + members["S0"], rows, queries)
    by_names = contrasts(world, base + members["ON"] + members["ONA"], rows, queries)
    by_answer = contrasts(world, base + members["SA"] + members["OA"] + members["ONA"], rows, queries)
    found = by_procedure[["auc", "auc_answer", "auc_nothing"]]
    assert found.min().to_numpy() == pytest.approx(1) and found.notna().mean().min() > 0.2  # rare answers have no pair
    assert (by_names.auc < 0.01).all() and by_names.auc_answer.mean() == pytest.approx(0.5, abs=0.03)
    # A shared answer is worth the same whatever was computed; one in twelve has it on either side.
    assert by_answer.auc.mean() == pytest.approx(0.5, abs=0.05)
    assert by_answer.auc_answer.mean() == pytest.approx(0.5, abs=0.03)
    assert by_names.names.mean() > 2 and by_names.same.mean() < 0.1 and by_procedure.same.mean() > 2


def test_negative_scores_count_where_two_sided(scan):
    world, rows, queries, members = scan
    values = noise((len(queries), len(rows))) * 0.01 - members["SA"] - members["S0"]
    one, two = (contrasts(world, values, rows, queries, two_sided=sides) for sides in (False, True))
    assert (one.auc < 0.01).all() and (two.auc > 0.99).all()


def test_shuffled_labels_leave_the_matched_contrast_at_chance(scan):
    world, rows, queries, members = scan
    kind, labels = (world.sequences[name].to_numpy(zero_copy_only=False)[rows] for name in ("kind", "procedure"))
    dealt = shuffled_within(kind, labels)
    for each in ("maths", "code"):
        assert sorted(dealt[kind == each]) == sorted(labels[kind == each]) and (dealt != labels).any()
    values = noise((len(queries), len(rows))) * 0.01 + members["SA"]
    assert contrasts(world, values, rows, queries).auc_answer.min() > 0.99
    control = contrasts(world, values, rows, queries, procedure=dealt)
    assert control.auc_answer.mean() == pytest.approx(0.5, abs=0.05)


def test_queries_of_one_procedure_correlate_where_they_draw_on_the_same_sequences(scan):
    world, _, queries, _ = scan
    labels = world.queries["procedure"].to_numpy()[queries]
    shared = noise((6, 2000), 1)[labels]
    for method in ("pearson", "spearman"):
        found = within_and_between(world, shared + noise(shared.shape), queries, method)
        assert found.within.dropna().to_numpy() == pytest.approx(0.5, abs=0.12)
        assert found.between.dropna().to_numpy() == pytest.approx(0, abs=0.12)
        assert (
            found.gap.equals(found.within - found.between)
            and found.within.notna().any()
            and found.between.notna().all()
        )


def test_correlations_leave_out_queries_that_share_a_word(scan):
    world, _, queries, _ = scan
    tokens = world.queries["input_ids"].to_pylist()
    frame = {world.vocabulary.index(word) for word in ("owns", "has", "holds", "so", "then", "thus")} | {0}
    kind, procedure = (world.queries[name].to_pylist() for name in ("kind", "procedure"))
    # One hot per query: correlations are the same for all pairs, so only which pairs count shows.
    values = np.eye(len(queries))
    found = within_and_between(world, values, queries)
    for place, query in enumerate(queries):
        usable = [
            other
            for other in queries
            if other != query
            and kind[other] == kind[query]
            and not (set(tokens[other]) & set(tokens[query])) - frame
            and procedure[other] == procedure[query]
        ]
        assert np.isnan(found.within[place]) == (not usable)


def test_shapes_and_methods_that_do_not_fit_are_refused(scan):
    world, rows, queries, _ = scan
    with pytest.raises(UserError, match="rows need"):
        contrasts(world, np.zeros((3, len(rows))), rows, queries)
    with pytest.raises(UserError, match="queries need"):
        within_and_between(world, np.zeros((3, 9)), queries)
    with pytest.raises(UserError, match="method='kendall'"):
        within_and_between(world, np.zeros((len(queries), 9)), queries, "kendall")
