"""Chapter 04: planted rankings give the numbers that can be told by hand."""

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import spearmanr

from influence_kit.corpora.world import World, token_columns
from influence_kit.corpora.worlds.ladder import Ladder, build, tiers
from influence_kit.errors import UserError
from influence_kit.findings.abstraction_vs_size import abstraction, overlap_ranks, partial_rank, top_decline
from influence_kit.measures.intervals import bootstrap, ratio_of_means

SMALL = {"agent_classes": 4, "event_classes": 4, "response_classes": 4, "class_words": 8, "flavours": 2}
SMALL |= {"documents": 4000, "queries": 12, "asked": 2, "held_out": 50, "dropped_cells": 4}


@pytest.fixture(scope="module")
def scan():
    world = build(Ladder(**SMALL))
    rows, queries = np.arange(3, 4000, 2), np.flatnonzero(world.queries["scored"].to_numpy(zero_copy_only=False))
    return world, rows, queries, {name: member[queries] for name, member in tiers(world, rows).items()}


def noise(shape):
    return np.random.default_rng(0).normal(size=shape)


def test_scores_that_know_nothing_have_lift_one(scan):
    world, rows, queries, _ = scan
    found = abstraction(world, noise((len(queries), len(rows))), rows, queries, top=0.5)
    assert found[["T2", "T0r", "T4", "T5"]].mean().to_numpy() == pytest.approx(1, abs=0.1)
    assert found.precision.mean() == pytest.approx(found.shuffled_precision.mean(), abs=0.15)


def test_meaning_and_overlap_are_told_apart(scan):
    world, rows, queries, members = scan
    shape = (len(queries), len(rows))
    by_rule = abstraction(world, noise(shape) * 0.1 + (members["T2"] | members["T3"]), rows, queries)
    by_word = abstraction(world, noise(shape) * 0.1 + (members["T2"] | members["T0r"]), rows, queries)
    index = [ratio_of_means(found[["T2", "T0r"]].to_numpy()) for found in (by_rule, by_word)]
    assert by_rule["T0r"].mean() == 0 and index[0] == np.inf
    assert index[1] == pytest.approx(1, abs=0.35)  # a shared word is worth the same in any rule
    assert (by_rule.meaning_mass == 1).all() and (by_rule.overlap_mass == 0).all()
    assert (by_word.overlap_mass > by_word.meaning_mass).all()
    assert (by_rule.precision == 1).all() and (by_rule.shuffled_precision < 0.2).all()
    assert (by_word.precision < 0.8).any()
    assert bootstrap(by_word[["T2", "T0r"]], np.zeros(len(by_word)), ratio_of_means).n == len(queries)


def test_negative_ends_count_where_two_sided(scan):
    world, rows, queries, members = scan
    values = noise((len(queries), len(rows))) * 0.1 - members["T2"]
    one, two = (abstraction(world, values, rows, queries, two_sided=sides) for sides in (False, True))
    assert (one["T2"] == 0).all() and (two["T2"] > 10).all()
    assert (one.meaning_mass > 0.9).all() and one.meaning_mass.equals(two.meaning_mass)


def test_shuffled_control_asks_other_rules_only(scan):
    world, rows, queries, members = scan
    concept = members["T1"] | members["T2"] | members["T3"]
    values = noise((len(queries), len(rows))) * 0.1 + concept
    found = abstraction(world, values, rows, queries)
    assert (found.precision == 1).all() and (found.shuffled_precision == 0).all()
    single = abstraction(world, values[:1], rows, queries[:1])
    assert np.isnan(single.shuffled_precision[0])


def test_shapes_that_do_not_fit_are_refused(scan):
    world, rows, queries, _ = scan
    with pytest.raises(UserError, match="need"):
        abstraction(world, np.zeros((3, len(rows))), rows, queries)
    with pytest.raises(UserError, match="k=5"):
        top_decline(np.zeros((2, 4)), np.zeros((2, 4)), k=5)


def test_top_scores_decline_by_the_quotient_of_their_means():
    large = np.array([[4.0, 2, 0, -9], [-1, -1, -1, -1]])
    small = 3 * large
    assert top_decline(small, large, k=2)[0] == pytest.approx(3)
    assert np.isnan(top_decline(small, large, k=2)[1])


def test_partial_rank_is_the_textbook_formula_and_leaves_out_what_overlap_explains():
    rng = np.random.default_rng(4)
    overlap = rng.normal(size=(3, 4000))
    concept = overlap + rng.normal(size=overlap.shape)
    explained, own = overlap + 0.1 * rng.normal(size=overlap.shape), concept + 0.1 * rng.normal(size=overlap.shape)
    assert np.abs(partial_rank(explained, concept, overlap)).max() < 0.1
    assert partial_rank(own, concept, overlap).min() > 0.9
    r = [spearmanr(a[0], b[0]).statistic for a, b in ((own, concept), (own, overlap), (concept, overlap))]
    by_hand = (r[0] - r[1] * r[2]) / np.sqrt((1 - r[1] ** 2) * (1 - r[2] ** 2))
    assert partial_rank(own, concept, overlap)[0] == pytest.approx(by_hand, rel=1e-9)
    assert np.isnan(partial_rank(own, np.ones_like(own), overlap)).all()


def test_overlap_ranks_read_each_querys_own_language():
    told = np.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 9, 9], [0, 8, 8, 9, 9, 9], [0, 1, 2, 3, 4, 5]])
    asked = told[:1]

    def table(tokens, languages):
        return pa.table({**token_columns(tokens, np.ones(tokens.shape, bool)), "language": languages})

    world = World("text", table(told, ["en", "en", "en", "de"]), table(asked, ["en"]), table(asked, ["en"]), (), "", {})
    values = np.array([[3.0, 2.0, 1.0, -9.0]])
    assert overlap_ranks(world, values, np.arange(4)) == pytest.approx([1.0])
    assert overlap_ranks(world, -values, np.arange(4)) == pytest.approx([-1.0])
