"""Chapter 05: planted rankings give the numbers that can be told by hand."""

import numpy as np
import pandas
import pytest

from influence_kit.corpora.worlds.atlas import Atlas, build, namesakes, supporters
from influence_kit.findings.cross_lingual import crossing, meaning, tier_lifts, x_and_transfer


@pytest.fixture(scope="module")
def scan():
    parameters = {
        "entities": 12,
        "relations": 2,
        "values": 6,
        "documents": 600,
        "most_supporters": 200,
        "noise_share": 0.2,
    }
    world = build(Atlas(**parameters, canaries=1, repetitions=(1,), held_out=20, queries=4))
    both = world.queries["availability"].to_numpy(zero_copy_only=False) == "both"
    return world, np.arange(0, 600, 2), np.flatnonzero(both)


def test_what_crosses_is_told_from_names(scan):
    world, rows, queries = scan
    own, other = (tier[queries].astype(float) for tier in supporters(world, rows))
    name = namesakes(world, rows)[1][queries].astype(float)
    noise = 0.1 * np.random.default_rng(0).random(own.shape)
    x, y = {}, {}
    for word, values in {"own": own, "facts": own + other, "names": other + name}.items():
        found = tier_lifts(world, values + noise, rows, queries, top=0.05).assign(seed=1)
        x[word], y[word] = crossing(found).value, meaning(found).value
    assert x["own"] < 0.1 and x["facts"] > 0.5 and not y["facts"] <= 10 and y["names"] < 3, (x, y)


def test_x_stands_beside_what_has_crossed():
    along = pandas.DataFrame(
        {"size": 1, "seed": 2, "fraction": [0.5, 1.0, 1.0], "other": [1.0, 2, 4], "own": [4.0, 4, 4]}
    )
    answers = pandas.DataFrame({"size": 1, "seed": 2, "fraction": [0.5, 1.0, 1.0, 1.0], "kind": "fact"})
    answers = answers.assign(availability=["first", "first", "second", "both"], correct=[0.0, 1, 0, 1])
    found = x_and_transfer(along, answers)
    assert found["x"].tolist() == [0.25, 0.75] and found["correct"].tolist() == [0, 0.5]
