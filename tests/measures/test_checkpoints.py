"""Which checkpoint is read."""

import numpy as np
import pandas
import pytest

from influence_kit.errors import UserError
from influence_kit.measures.checkpoints import half_nat, nearest


def test_half_nat_takes_the_nearest_kept_checkpoint():
    answers = pandas.DataFrame(
        {"fraction": np.repeat([0, 0.25, 0.5, 1.0], 2), "log_p": -np.array([0.5, 0.5, 2, 1, 0.3, 0.5, 0.0, 0.1])}
    )
    path = (0.25, 0.5, 1.0)
    assert half_nat(answers, path) == 0.5
    assert half_nat(answers, [1 / 4, 1]) == 1.0  # losses 1.5 and .05
    assert half_nat(answers, path, nats=1.4) == 0.25
    assert half_nat(answers, [0.2501, 1]) == 1.0 and half_nat(answers, [0.4999]) == 0.4999
    with pytest.raises(UserError, match="No checkpoint"):
        half_nat(answers, [0.75])


def test_of_equally_near_checkpoints_the_first_is_nearest():
    assert nearest(0.5, (0.25, 0.75)) == 0.25
