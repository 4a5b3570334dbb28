"""What a query's own sequences do: by hand, and bad input."""

import numpy as np
import pytest

from influence_kit.errors import UserError
from influence_kit.measures.agreement import own_effects


def test_own_effects_are_what_others_do_not_lose():
    rng = np.random.default_rng(0)
    asked, log_p = np.array([4, 1, 2]), rng.normal(size=(3, 2, 2, 5))
    found = own_effects(log_p, asked)
    for k, c, r in np.ndindex(3, 2, 2):
        others = [log_p[j, c, r, asked[k]] for j in range(3) if j != k]
        assert found[k, c, r] == pytest.approx(log_p[k, c, r, asked[k]] - np.mean(others))
    # What every training loses alike is no effect, and what one query loses by its own alone is all of it.
    log_p = np.zeros((3, 2, 2, 5)) - rng.normal(size=(1, 2, 2, 5))
    log_p[1, 0, :, 1] -= 3
    found = own_effects(log_p, asked)
    assert found[1, 0] == pytest.approx(-3) and np.abs(np.delete(found, 1, 0)).max() < 1e-9
    with pytest.raises(UserError, match="Only one query"):
        own_effects(log_p[:1], asked[:1])
    with pytest.raises(UserError, match=r"give \[K, C, R, Q\]"):
        own_effects(log_p, asked[:2])
