"""Ratios and agreement over partitions, on tables whose answer is known."""

import numpy as np
import pandas as pd
import pytest

from influence_kit.errors import UserError
from influence_kit.measures.order import RATIOS, agreement, by_partition, excess, levels, ratio, ratios

PARTITIONS = sorted({name for pair in RATIOS.values() for name in pair})


def table(values, seed=0, instances=2):
    """`values` [Q, partitions]: instances lie around them so that their mean is exact."""
    rows = [
        {"seed": seed, "query": q, "partition": name, "instance": i, "influence": values[q, p] + (2 * i - 1) * 0.5}
        for q in range(len(values))
        for p, name in enumerate(PARTITIONS)
        for i in range(instances)
    ]
    return pd.DataFrame(rows)


def values(queries=5, seed=0):
    return np.random.default_rng(seed).normal(3, 1, (queries, len(PARTITIONS)))


def test_instances_are_averaged_and_seeds_kept_apart():
    one, two = values(), values(seed=1)
    means = by_partition(pd.concat([table(one, 11), table(two, 12)], ignore_index=True))
    assert list(means.columns) == PARTITIONS and means.index.names == ["seed", "query"]
    np.testing.assert_allclose(means.loc[11].to_numpy(), one)
    np.testing.assert_allclose(means.loc[12].to_numpy(), two)
    assert by_partition(table(one).drop(columns="seed")).index.get_level_values("seed").unique().tolist() == [0]


def test_ratio_is_of_means_within_a_seed_and_averaged_over_seeds():
    one, two = values(), values(seed=1) * 10  # a mean over both seeds' queries would be ruled by the second
    means = by_partition(pd.concat([table(one, 11), table(two, 12)], ignore_index=True))
    above, below = (PARTITIONS.index(name) for name in ("flipped", "forward"))
    expected = np.mean([v[:, above].mean() / v[:, below].mean() for v in (one, two)])
    found = ratio(means, "flipped", "forward")
    assert found.value == pytest.approx(expected) and found.low < found.value < found.high and found.seeds == (11, 12)
    assert found.value != pytest.approx(
        (np.concatenate([one, two])[:, above] / np.concatenate([one, two])[:, below]).mean()
    )
    every = ratios(means)
    assert set(every) == set(RATIOS) and every["flipped"].value == found.value
    assert every["bare"].value == ratio(means, "flipped", "flipped_without_relation").value


def test_excess_is_a_difference_in_units_of_forward():
    one = values()
    means = by_partition(table(one))
    a, b, unit = (one[:, PARTITIONS.index(name)].mean() for name in ("flipped", "value_only", "forward"))
    assert excess(means, "flipped", "value_only").value == pytest.approx((a - b) / unit)
    assert excess(means, "flipped", "flipped").value == 0
    with pytest.raises(UserError, match="no 'backward' phrases"):
        excess(means, "flipped", "value_only", "backward")


def test_levels_are_plain_means():
    one = values()
    found = levels(by_partition(table(one)))
    assert [found[name].value for name in PARTITIONS] == pytest.approx(one.mean(0))


def test_agreement_of_a_known_relation():
    true = by_partition(table(values()))
    scaled = agreement(true * 7, true)
    assert scaled[["pearson", "spearman"]].to_numpy() == pytest.approx(1) and scaled[
        "slope"
    ].to_numpy() == pytest.approx(7)
    assert agreement(-true, true)["spearman"].to_numpy() == pytest.approx(-1)
    curved = agreement(true**3, true)
    assert curved["spearman"].to_numpy() == pytest.approx(1) and (curved["pearson"] < 0.999).all()


def test_agreement_equals_scipy_and_is_nan_without_variation():
    from scipy.stats import pearsonr, spearmanr

    x, y = by_partition(table(values(seed=2))), by_partition(table(values(seed=3)))
    found = agreement(x, y)
    for n in range(5):
        a, b = x.to_numpy()[n], y.to_numpy()[n]
        assert found["pearson"].iloc[n] == pytest.approx(pearsonr(a, b)[0])
        assert found["spearman"].iloc[n] == pytest.approx(spearmanr(a, b)[0])
        assert found["slope"].iloc[n] == pytest.approx(np.linalg.lstsq(b[:, None], a, rcond=None)[0][0])
    constant = agreement(x * 0 + 1, y)
    assert constant[["pearson", "spearman"]].isna().to_numpy().all()


def test_what_is_missing_is_named():
    whole = table(values())
    with pytest.raises(UserError, match="'delta' is no column"):
        by_partition(whole, "delta")
    with pytest.raises(UserError, match="forward"):
        by_partition(whole[~((whole["query"] == 2) & (whole["partition"] == "forward"))])
    with pytest.raises(UserError, match="no 'backward' phrases"):
        ratio(by_partition(whole), "backward", "forward")
    other = by_partition(whole[whole["query"] < 4])
    with pytest.raises(UserError, match="same queries"):
        agreement(other, by_partition(whole))
