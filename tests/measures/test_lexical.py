"""Lexical baselines: counts, IDF overlap and BM25 by hand and against scikit-learn."""

import math

import numpy as np
import pytest
from scipy import sparse

from influence_kit.corpora.worlds import ladder
from influence_kit.errors import UserError
from influence_kit.measures import lexical

# Token 0 stands in every document, 3 in one, 4 in none.
DOCUMENTS = [[0, 1, 1, 2], [0, 2], [0, 3, 2, 2, 2, 2]]
QUERIES = [[0, 1, 1], [3, 4], []]


def idf(n: int, c: int = 3) -> float:
    return math.log((c - n + 0.5) / (n + 0.5) + 1)


def test_counts_with_mask_and_ignored_tokens():
    rows = np.array([[5, 1, 1], [2, 1, 5]])
    mask = np.array([[True, True, False], [True, True, True]])
    counts = lexical.token_counts(rows, mask, vocabulary_size=6, ignore=[5])
    assert counts.toarray().tolist() == [[0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]]
    assert lexical.token_counts([[], []]).shape == (2, 0)


def test_idf_overlap_by_hand():
    overlap = lexical.idf_overlap(QUERIES, DOCUMENTS)
    expected = [[idf(3) + idf(1), idf(3), idf(3)], [0, 0, idf(1)], [0, 0, 0]]
    assert overlap == pytest.approx(np.array(expected))
    assert lexical.inverse_document_frequency(DOCUMENTS) == pytest.approx([idf(3), idf(1), idf(3), idf(1)])


def test_bm25_by_hand():
    def weight(tf: int, length: int, n: int) -> float:
        return idf(n) * tf * 2.5 / (tf + 1.5 * (0.25 + 0.75 * length / 4))

    scores = lexical.bm25(QUERIES, DOCUMENTS)
    assert scores[0] == pytest.approx([weight(1, 4, 3) + 2 * weight(2, 4, 1), weight(1, 2, 3), weight(1, 6, 3)])
    assert scores[1] == pytest.approx([0, 0, weight(1, 6, 1)])
    assert lexical.bm25(QUERIES, DOCUMENTS, b=0)[1, 2] == pytest.approx(idf(1))


def test_bm25_of_distinct_tokens_in_equal_lengths_is_idf_overlap():
    rng = np.random.default_rng(0)
    documents = np.array([rng.choice(200, 20, replace=False) for _ in range(300)])
    assert np.allclose(lexical.bm25(documents[:5], documents), lexical.idf_overlap(documents[:5], documents))


def test_overlap_agrees_with_scikit_learn():
    from sklearn.feature_extraction.text import CountVectorizer

    rng = np.random.default_rng(0)
    documents, queries = rng.zipf(1.5, (50, 30)) % 97, rng.zipf(1.5, (7, 10)) % 97
    vectorizer = CountVectorizer(binary=True, vocabulary=[str(i) for i in range(97)], token_pattern=r"\d+")
    present = [
        vectorizer.transform([" ".join(map(str, row)) for row in rows]).toarray() for rows in (queries, documents)
    ]
    n = present[1].sum(0)
    expected = (present[0] * np.log((50 - n + 0.5) / (n + 0.5) + 1)) @ present[1].T
    assert np.allclose(lexical.idf_overlap(queries, documents), expected)


def test_rows_and_counts_give_the_same_and_stay_untouched():
    counts = lexical.token_counts(DOCUMENTS)
    assert np.array_equal(lexical.bm25(QUERIES, counts), lexical.bm25(QUERIES, DOCUMENTS))
    assert np.array_equal(lexical.bm25(QUERIES, sparse.csr_matrix(counts.toarray())), lexical.bm25(QUERIES, DOCUMENTS))
    assert counts.shape == (3, 4)


def test_shares_tokens_leaves_frequent_ones_out():
    assert lexical.shares_tokens(QUERIES, DOCUMENTS, rarer_than=0.5).tolist() == [
        [True, False, False],
        [False, False, True],
        [False, False, False],
    ]
    assert lexical.shares_tokens(QUERIES, DOCUMENTS, rarer_than=1.1)[0].all()
    assert not lexical.shares_tokens(QUERIES, DOCUMENTS, rarer_than=0.05).any()


def test_refusals_name_the_value():
    with pytest.raises(UserError, match="-100"):
        lexical.token_counts([[1, -100]])
    with pytest.raises(UserError, match="vocabulary of 3"):
        lexical.token_counts([[1, 7]], vocabulary_size=3)
    with pytest.raises(UserError, match="mask has 1 entries"):
        lexical.token_counts([[1, 7]], mask=[[True]])


def test_overlap_sees_the_response_word_of_ladder_and_not_the_rule():
    small = {"agent_classes": 4, "event_classes": 4, "response_classes": 4, "class_words": 8, "flavours": 2}
    world = ladder.build(ladder.Ladder(**small, documents=3000, queries=12, asked=2, held_out=50, dropped_cells=4))
    rows, queries = np.arange(world.sequences.num_rows), np.arange(12)
    values, members = lexical.overlap(world, rows, queries, b=0.75), ladder.tiers(world, rows)
    sharing = [values[members[tier][queries]].mean() for tier in ("T2", "T0r", "T3", "T5")]
    assert sharing[0] == pytest.approx(sharing[1], rel=0.05) and sharing[1] > 2 * max(sharing[2:])
