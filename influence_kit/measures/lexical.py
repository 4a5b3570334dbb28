"""Token overlap between queries and documents: the baseline that every influence score is shown beside.

Rows of token ids become sparse counts [rows, V]; scores come back dense, [Q, N]. Wherever queries or documents are
asked for, both rows of ids (lists or an integer array) and the sparse counts of `token_counts` will do: the latter when
a loss mask or special tokens are to be left out, or when the same documents are used often.

Source of the weights: Grosse et al. 2023 (arXiv 2308.03296), Equations 28 and 29, with k1 = 1.5; Robertson and Zaragoza
2009 for the length normalisation b of BM25, which plays no part when all sequences are equally long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from influence_kit.corpora.world import World, token_matrix
from influence_kit.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from scipy.sparse import csr_array

# Rows of token ids, or the sparse counts of `token_counts`: no type covers both.
Rows: TypeAlias = Any


def token_counts(rows, mask=None, vocabulary_size: int | None = None, ignore: Sequence[int] = ()) -> csr_array:
    """How often each token stands in each row.

    Args:
        rows: Token ids [N, T], or N lists of any length.
        mask: bool of the same shape; tokens where it is False are left out.
        vocabulary_size: V; the largest id plus one by default.
        ignore: Ids that never count, such as padding and begin-of-sequence.

    Returns:
        Sparse float [N, V].

    Raises:
        UserError: A mask of another shape, or an id below 0 or beyond the vocabulary.
    """
    from scipy import sparse

    lengths = np.array([len(row) for row in rows], dtype=int)
    tokens = (
        np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]) if lengths.sum() else np.empty(0, np.int64)
    )
    index = np.repeat(np.arange(lengths.size), lengths)
    keep = ~np.isin(tokens, np.asarray(ignore, dtype=np.int64))
    if mask is not None:
        mask_lengths = np.array([len(row) for row in mask], dtype=int)
        if not np.array_equal(lengths, mask_lengths):
            raise UserError(
                f"The mask has {mask_lengths.sum()} entries in {mask_lengths.size} rows and the tokens {lengths.sum()} "
                f"in {lengths.size}; give a mask of the tokens' shape."
            )
        keep &= np.concatenate([np.asarray(row, dtype=bool) for row in mask]) if lengths.sum() else keep
    tokens, index = tokens[keep], index[keep]
    size = vocabulary_size if vocabulary_size is not None else int(tokens.max(initial=-1)) + 1
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < size:
        raise UserError(
            f"Token ids lie between {tokens.min()} and {tokens.max()}, outside a vocabulary of {size}; "
            "mask padding or give a larger vocabulary_size."
        )
    counts = sparse.coo_array((np.ones(tokens.size), (index, tokens)), shape=(lengths.size, size)).tocsr()
    counts.sum_duplicates()
    return counts


def _aligned(queries: Rows, documents: Rows) -> tuple[csr_array, csr_array]:
    from scipy import sparse

    pair = [sparse.csr_array(rows) if sparse.issparse(rows) else token_counts(rows) for rows in (queries, documents)]
    size = max(counts.shape[1] for counts in pair)
    # Widened over the same buffers: `resize` would change the caller's matrix.
    first, second = (sparse.csr_array((x.data, x.indices, x.indptr), shape=(x.shape[0], size)) for x in pair)
    return first, second


def _present(counts: csr_array) -> csr_array:
    return (counts > 0).astype(float).tocsr()


def document_frequency(documents: Rows) -> np.ndarray:
    """Number of documents that hold each token [V]."""
    return np.asarray(_present(_aligned(documents, documents)[0]).sum(0)).ravel()


def inverse_document_frequency(documents: Rows) -> np.ndarray:
    """IDF of each token [V]: log((C - n + .5) / (n + .5) + 1), n of C documents hold it (paper, Eq 29)."""
    counts = _aligned(documents, documents)[0]
    n = document_frequency(counts)
    return np.log((counts.shape[0] - n + 0.5) / (n + 0.5) + 1)


def idf_overlap(queries: Rows, documents: Rows) -> np.ndarray:
    """Sum of the IDF of the tokens that query and document share, each counted once.

    With presence in place of counts the saturation (k1 + 1) tf / (k1 + tf) of Equation 28 is 1 and this is what is
    left.

    Args:
        queries: Token ids or counts of Q queries.
        documents: Token ids or counts of N documents; IDF is counted on these.

    Returns:
        [Q, N], nats.

    Raises:
        UserError: As `token_counts`.
    """
    queries, documents = _aligned(queries, documents)
    weighted = _present(queries).multiply(inverse_document_frequency(documents)[None]).tocsr()
    return (weighted @ _present(documents).T).toarray()


def bm25(queries: Rows, documents: Rows, k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """BM25 score of every document for every query; a repeated query token counts again.

    sum over the query's tokens of IDF * tf (k1 + 1) / (tf + k1 (1 - b + b length / mean length)).

    Args:
        queries: Token ids or counts of Q queries.
        documents: Token ids or counts of N documents; IDF and mean length are counted on these.
        k1: Saturation of a token's count.
        b: Strength of length normalisation, 0 for none.

    Returns:
        [Q, N], nats.

    Raises:
        UserError: As `token_counts`.
    """
    from scipy import sparse

    queries, documents = _aligned(queries, documents)
    length = np.asarray(documents.sum(1)).ravel()
    row = np.repeat(np.arange(documents.shape[0]), np.diff(documents.indptr))
    saturation = k1 * (1 - b + b * length / max(length.mean(), 1e-12)) if length.size else length
    weights = documents.data * (k1 + 1) / (documents.data + saturation[row])
    weights = weights * inverse_document_frequency(documents)[documents.indices]
    weighted = sparse.csr_array((weights, documents.indices, documents.indptr), shape=documents.shape)
    return (queries @ weighted.T).toarray()


def shares_tokens(queries: Rows, documents: Rows, rarer_than: float = 0.05) -> np.ndarray:
    """Whether query and document share a token that few of the documents hold.

    Frequent tokens (function words, punctuation) are shared by almost all pairs and say nothing.

    Args:
        queries: Token ids or counts of Q queries.
        documents: Token ids or counts of N documents.
        rarer_than: The share of documents that a token must stand in less of; above 1 every token counts.

    Returns:
        bool [Q, N].

    Raises:
        UserError: As `token_counts`.
    """
    queries, documents = _aligned(queries, documents)
    rare = document_frequency(documents) < rarer_than * documents.shape[0]
    return (_present(queries).multiply(rare[None]).tocsr() @ _present(documents).T).toarray() > 0


def words(table: pa.Table) -> list[list[int]]:
    """Token ids of each row of a world's table up to its last target, without the first (a document's start)."""
    last = [int(np.flatnonzero(mask)[-1]) for mask in token_matrix(table, "loss_mask")]
    return [row[1 : end + 1].tolist() for row, end in zip(token_matrix(table), last, strict=True)]


def target_counts(table: pa.Table, vocabulary_size: int | None = None, ignore: Sequence[int] = ()) -> csr_array:
    """`token_counts` of the targets of each row of a world's table: of a query what is answered, not what is asked."""
    return token_counts(token_matrix(table), token_matrix(table, "loss_mask"), vocabulary_size, ignore)


def overlap(world: World, rows: np.ndarray, queries: np.ndarray, k1: float = 1.5, b: float = 0.0) -> np.ndarray:
    """TF-IDF score [Q, N] of the sequences at `rows` for prompt and completion of the queries at `queries`.

    Equation 28 and 29 of the paper (k1 = 1.5, no length normalisation); b above 0 makes it BM25.
    """
    return bm25(words(world.queries.take(queries)), words(world.sequences.take(rows)), k1, b)
