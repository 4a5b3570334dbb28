"""Shares of blocks, centre of mass and tests between kinds: by hand, and against scores whose cause is known."""

import numpy as np
import pytest
from scipy.stats import f_oneway

from influence_kit.corpora.worlds import ladder
from influence_kit.corpora.worlds.deep import Deep, build
from influence_kit.errors import UserError
from influence_kit.measures.layers import (
    block_shares,
    by_third,
    centre_of_mass,
    largest_block,
    middle_above_ends,
    permutation_test,
    preference,
    share_table,
    third_of,
    thirds_table,
    variance_explained,
)


def test_shares_read_the_top_by_all_blocks_and_add_up_with_signs():
    values = np.zeros((1, 4, 3))
    values[0, 0] = [5, 1, -1]
    values[0, 1] = [3, 3, -1]
    values[0, 2] = [0, 0, 4]  # third by the sum: outside the top half
    assert block_shares(values, top=0.5)[0] == pytest.approx([8 / 12, 4 / 12, 0])
    # With three of the four, the last block comes out above 0: 4 - 2.
    assert block_shares(values, top=0.75)[0] == pytest.approx([8 / 14, 4 / 14, 2 / 14])
    assert np.isnan(block_shares(-np.ones((1, 4, 3)), top=0.5)).all()


def test_centre_of_mass_by_hand():
    shares = np.array([[1, 0, 0, 0], [0, 0, 0, 1], [0.25] * 4, [0, 0.5, 0.5, 0]], float)
    assert centre_of_mass(shares) == pytest.approx([0.125, 0.875, 0.5, 0.5])
    spread = share_table(np.repeat(shares[:, None], 2, 1), list("abcd"), top=1.0)["spread"]
    assert spread[:2].tolist() == [0, 0] and spread[2] > spread[3] > 0


@pytest.mark.parametrize(("blocks", "sizes"), [(12, [4, 4, 4]), (9, [3, 3, 3]), (3, [1, 1, 1]), (10, [4, 3, 3])])
def test_thirds_part_the_blocks(blocks, sizes):
    assert np.bincount(third_of(blocks)).tolist() == sizes
    values = np.random.default_rng(0).normal(size=(2, 5, blocks))
    parts = by_third(values)
    np.testing.assert_allclose(sum(parts.values()), values.sum(2))
    np.testing.assert_allclose(parts["lower"], values[:, :, : sizes[0]].sum(2))


def test_two_blocks_have_no_thirds():
    with pytest.raises(UserError, match="2 block"):
        third_of(2)
    table = share_table(np.ones((3, 5, 2)), ["a", "b", "c"], top=1.0)
    assert table[["lower", "middle", "upper"]].isna().all().all() and (table["block_1"] == 0.5).all()


def test_wrong_shapes_are_refused():
    with pytest.raises(UserError, match=r"\[queries, sequences, blocks\]"):
        block_shares(np.ones((3, 4)))


def test_variance_explained_is_that_of_the_analysis_of_variance():
    rng = np.random.default_rng(1)
    groups = np.repeat(["a", "b", "c"], 8)
    values = rng.normal(size=24) + np.repeat([0, 1, 3], 8)
    f = f_oneway(*(values[groups == g] for g in "abc")).statistic
    expected = 1 - (23 / 21) * (21 / (2 * f + 21))
    assert variance_explained(values, groups) == pytest.approx(expected)
    assert variance_explained([0, 0, 1, 1], list("aabb")) == 1
    assert np.isnan(variance_explained([1, 1, 1], list("abb"))) and np.isnan(variance_explained([1, 2], list("aa")))


def test_permutation_test_knows_a_difference_from_none():
    rng = np.random.default_rng(2)
    seeds, groups = np.repeat([11, 12], 40), np.tile(np.repeat(["a", "b"], 20), 2)
    noise = rng.normal(size=80) + 100 * (seeds == 12)  # what differs between seeds is no difference of groups
    value, p, permuted = permutation_test(noise + (groups == "a"), groups, seeds, draws=300)
    assert value > 0.1 and p < 0.02 and abs(permuted.mean()) < 0.01
    value, p, _ = permutation_test(noise, groups, seeds, draws=300)
    assert value < 0.1 and p > 0.05


def test_preference_and_the_middle_s_lead_by_hand():
    lifts = np.array([[1.0, 3, 4, 1, 0, 0], [1, 3, 2, 1, 2, 2]])
    assert preference(lifts[:, :2]) == pytest.approx(0.25) and preference(lifts[:, 2:4]) == pytest.approx(0.75)
    assert middle_above_ends(lifts) == pytest.approx(0.75 - 0.5)
    draws = np.stack([lifts, lifts[::-1], lifts])
    assert middle_above_ends(draws, axis=1) == pytest.approx([0.25] * 3)
    assert np.isnan(preference(np.zeros((2, 2))))
    assert largest_block(np.array([[0.5, 0.5, 0], [0.1, 0.7, 0.2]])) == pytest.approx(1.8)


def test_thirds_table_finds_the_third_that_was_made_to_prefer_meaning():
    world = build(
        Deep(
            documents=4000,
            held_out=60,
            scored=6,
            atlas={"entities": 24, "relations": 2, "queries": 6, "canaries": 2, "repetitions": (4,)},
            cast={"queries": 20},
        )
    )
    rows, queries = np.arange(4000), np.flatnonzero(world.queries["scored"].to_numpy(zero_copy_only=False))
    values = np.random.default_rng(3).random((len(queries), 4000, 6)) * 0.1
    tiers = ladder.tiers(world, rows)
    both = (tiers["T2"] | tiers["T0r"])[queries]
    values[:, :, 0] += both
    values[:, :, 2] += tiers["T2"][queries]
    values[:, :, 5] += both
    found = thirds_table(world, values, rows, queries, top=0.02)
    assert found["contrast"].value_counts().to_dict() == {"rule": 6, "language": 6, "persona": 6}
    rules = found[found["contrast"] == "rule"]
    kept = {
        name: preference(rules[[f"{name}_first", f"{name}_second"]].to_numpy()) for name in ("lower", "middle", "upper")
    }
    assert kept["middle"] > 0.95 and all(0.3 < kept[name] < 0.7 for name in ("lower", "upper"))
