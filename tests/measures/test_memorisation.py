"""Where a canary's own text lands in a ranking."""

import numpy as np
import pytest

from influence_kit.corpora.worlds.atlas import Atlas, build
from influence_kit.errors import UserError
from influence_kit.measures.memorisation import largest_share, others, sources


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
    assert others(world, copies + 0.001, rows, queries)["hit"].tolist() == [0] * 4
    swapped = copies[[1, 0, 3, 2]]  # two canaries for each number of repetitions
    found = others(world, swapped + 0.001, rows, queries)
    assert found["repetitions"].tolist() == [1, 1, 4, 4] and found["hit"].tolist() == [1] * 4
    np.testing.assert_allclose(found["share"], sources(world, copies + 0.001, rows, queries)["share"])
    with pytest.raises(UserError, match="planted 1 times"):
        others(world, copies[:1].astype(float), rows, queries[:1])
