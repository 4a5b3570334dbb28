"""Token maps by hand: alignments, hits, shares, and the choice between two statements."""

import numpy as np
import pytest

from influence_kit.errors import UserError
from influence_kit.measures.token_maps import (
    by_token,
    chance,
    hit,
    preferred,
    read_maps,
    share,
    share_before,
    shared_tokens,
)

SCORES = np.array([[0.0, 1, -6, 3, 0], [2.0, 1, 1, 0, 0], [0.0] * 5])
KEY = np.array([[0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0]], bool)


def test_predicted_is_one_token_later():
    np.testing.assert_array_equal(by_token(SCORES, "predicted")[:2], [[0, 0, 1, -6, 3], [0, 2, 1, 1, 0]])
    np.testing.assert_array_equal(by_token(SCORES, "updating"), SCORES)
    with pytest.raises(UserError, match="'next'"):
        by_token(SCORES, "next")


def test_hits_and_shares_read_the_size_of_a_score():
    np.testing.assert_array_equal(hit(by_token(SCORES, "predicted"), KEY), [1, 1, np.nan])
    np.testing.assert_array_equal(hit(SCORES, KEY), [0, 0, np.nan])
    np.testing.assert_allclose(share(by_token(SCORES, "predicted"), KEY), [0.6, 0.5, np.nan])
    np.testing.assert_array_equal(hit(SCORES, np.zeros_like(KEY)), [np.nan] * 3)


def test_shares_before_the_key_count_back_from_it():
    found = share_before(SCORES, KEY, most=3)
    np.testing.assert_allclose(found, [[0.3, 0.6, 0.1], [0.25, 0.5, 0], [np.nan] * 3])
    two = KEY | np.roll(KEY, 1, axis=1)
    assert np.isnan(share_before(SCORES, two)).all()


def test_chance_is_the_share_of_marked_candidates():
    candidates = np.array([[0, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 1, 0, 0]], bool)
    np.testing.assert_allclose(chance(KEY, candidates), [0.25, 0.5, 0.5])
    assert np.isnan(chance(np.zeros_like(KEY), candidates)).all()


def test_the_asked_statement_against_its_rival():
    span = np.array([[0, 1, 1, 0, 0]] * 3, bool)
    rival = np.array([[0, 0, 0, 1, 1], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(preferred(SCORES, span, rival), [1, 0.5, np.nan])
    assert np.isnan(preferred(SCORES, span, np.zeros_like(rival))).all()


def test_a_table_has_each_pair_with_a_key_once_for_each_reading():
    maps = {"ekfac": SCORES, "plain": 2 * SCORES, "other": SCORES * 0, "replaced": by_token(SCORES, "predicted")}
    key = KEY.copy()
    key[1] = False
    candidates = np.ones_like(key)
    candidates[:, 0] = False
    found = read_maps(maps, key, key, np.zeros_like(key), candidates)
    assert len(found) == 2 * 7 and set(found["pair"]) == {0, 2}
    first = found[found["pair"] == 0].set_index(["method", "alignment"])["hit"]
    assert first["ekfac", "predicted"] == first["plain", "predicted"] == first["replaced", "token"] == 1
    assert first["ekfac", "updating"] == 0 and np.isnan(first["other", "predicted"])
    assert (found["chance"] == 0.25).all()


def test_shared_tokens_are_rare_and_in_both():
    documents = np.array([[0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 5]])
    queries, sequences = np.array([[0, 1, 5], [0, 2, 2]]), np.array([[0, 5, 1], [0, 3, 2]])
    candidates = np.array([[0, 1, 1], [0, 1, 0]], bool)
    found = shared_tokens(queries, sequences, candidates, documents, rare=0.5)
    np.testing.assert_array_equal(found, [[0, 1, 0], [0, 0, 0]])
