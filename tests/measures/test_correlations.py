"""Correlations row by row, against numpy's and by hand."""

import numpy as np
import pytest

from influence_kit.errors import UserError
from influence_kit.measures.correlations import correlations, rank_correlations


def test_rows_are_correlated_with_their_like():
    a = np.array([[1.0, 2, 3], [1, 2, 3], [1, 1, 1]])
    b = np.array([[2.0, 4, 9], [3, 2, 1], [1, 2, 3]])
    assert correlations(a, b)[1] == pytest.approx(-1) and np.isnan(correlations(a, b)[2])
    assert rank_correlations(a, b)[0] == pytest.approx(1) and correlations(a, b)[0] < 1
    with pytest.raises(UserError, match="cannot be correlated"):
        correlations(a, b[:, :2])


def test_they_are_pearson_s_whatever_the_scale():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 30))
    np.testing.assert_allclose(correlations(a, b), [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b)])
    np.testing.assert_allclose(correlations(a, 3 * a - 2), 1)
