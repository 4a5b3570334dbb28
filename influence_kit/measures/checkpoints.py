"""Which checkpoint of a model is read. A kept one lies at a whole step, next to the fraction of training that was asked
for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from influence_kit.errors import UserError

if TYPE_CHECKING:
    import pandas

READ = (
    "read"  # in place of a fraction of training: the kept checkpoint that a finding reads, `half_nat` of what is asked
)


def nearest(fraction: float, fractions: Iterable[float]) -> float:
    """The one of `fractions` that is nearest to a fraction of training; of equally near ones the first."""
    return min(fractions, key=lambda at: abs(at - fraction))


def half_nat(answers: pandas.DataFrame, fractions: Iterable[float], nats: float = 0.5) -> float:
    """The fraction of training, one of those given, at which the mean loss of the queries in `answers` is nearest
    `nats`.

    answers: fraction, log_p (nats), a row for each query and checkpoint. Of equally near ones the earliest; the
    untrained model counts not. Raises UserError where none of the fractions was kept.
    """
    loss = -answers.groupby("fraction")["log_p"].mean()
    kept = {wanted: float(loss[at]) for wanted in fractions for at in loss.index if at > 0 and abs(at - wanted) <= 0.02}
    if not kept:
        raise UserError(
            f"No checkpoint is among the fractions {fractions}; kept are {[round(f, 3) for f in loss.index]}."
        )
    return min(sorted(kept), key=lambda at: abs(kept[at] - nats))
