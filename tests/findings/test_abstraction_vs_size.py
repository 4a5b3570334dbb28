"""Chapter 04: planted rankings give the numbers that can be told by hand."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy.stats import spearmanr

from influence_kit.corpora.world import World, token_columns
from influence_kit.corpora.worlds.ladder import Ladder, build, tiers
from influence_kit.errors import UserError
from influence_kit.findings.abstraction_vs_size import (
    MASS,
    abstraction,
    by_what_is_gone,
    meaning_share,
    overlap_ranks,
    partial_rank,
    share,
    slope_given,
    without_rule,
)

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


def test_meaning_and_overlap_are_told_apart(scan):
    world, rows, queries, members = scan
    shape = (len(queries), len(rows))
    by_rule = abstraction(world, noise(shape) * 0.1 + (members["T2"] | members["T3"]), rows, queries)
    by_word = abstraction(world, noise(shape) * 0.1 + (members["T2"] | members["T0r"]), rows, queries)
    assert by_rule["T0r"].mean() == 0 and by_word[["T2", "T0r"]].min().min() > 1
    assert (by_rule.meaning_mass == 1).all() and (by_rule.overlap_mass == 0).all()
    assert share(by_rule[MASS].to_numpy()) == 1 and share(by_word[MASS].to_numpy()) < 0.5
    against = abstraction(world, -noise(shape) * 0.1 - members["T2"], rows, queries)
    assert share(against[MASS].to_numpy()) > 0.9  # of either sign
    found = meaning_share(pd.concat([by_rule.assign(seed=0), by_word.assign(seed=1)]))
    assert list(found.per_seed.values()) == pytest.approx([1, share(by_word[MASS].to_numpy())])


def test_slopes_over_size_leave_out_what_is_given():
    size, correct = np.array([1e3, 1e4, 1e5] * 2), np.array([0.1, 0.4, 0.2, 0.9, 0.5, 0.3])
    seeds = [
        pd.DataFrame({"size": size, "correct": correct, "share": 0.5 * correct + beyond * np.log10(size), "seed": seed})
        for seed, beyond in enumerate((0.0, 0.2))
    ]
    found = slope_given(pd.concat(seeds), "correct")
    assert list(found.per_seed.values()) == pytest.approx([0, 0.2]) and found.value == pytest.approx(0.1)


def test_what_a_rule_s_documents_cost_is_beyond_combinations_that_lose_none_and_of_that_arm_alone():
    cost = {
        ("dropped_rule", 100): (0.25, 0.75),
        ("dropped_rule", 900): (0.5, 0.25),
        ("dropped_T0r", 900): (0.125, 0.125),
    }
    lost = pd.DataFrame(
        {"arm": arm, "size": size, "seed": seed, "treated": treated, "gained": 0.125 - treated * by_seed[seed]}
        for (arm, size), by_seed in cost.items()
        for seed in (0, 1)
        for treated in (True, False)
        for _ in range(3)
    )
    assert without_rule(lost).to_numpy().tolist() == [[-0.25, -0.5], [-0.75, -0.25]]
    table = by_what_is_gone(lost).set_index(["gone", "parameters"])["estimate"]
    assert table.to_dict() == {
        ("the word, another rule", 900): -0.125,
        ("the same rule", 100): -0.5,
        ("the same rule", 900): -0.375,
    }


def test_shapes_that_do_not_fit_are_refused(scan):
    world, rows, queries, _ = scan
    with pytest.raises(UserError, match="need"):
        abstraction(world, np.zeros((3, len(rows))), rows, queries)


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
