"""Chapter 01: its tables, by hand and from a small world."""

import pandas

from influence_kit.corpora.worlds.atlas import Atlas, build
from influence_kit.findings.worlds_and_models import documents, least, measured, questions, right


def test_accuracy_of_the_worse_of_two_models():
    facts = pandas.DataFrame(
        {"seed": 1, "query": [0, 1, 0, 1, 0], "size": [8, 8, 4, 4, 4], "fraction": [1, 1, 1, 1, 0.5]}
    )
    found = right(facts.assign(availability="both", correct=[True, True, True, False, False]), ["both"])
    assert found[[4, 8]].to_numpy().tolist() == [[1, 1], [0, 1]] and least(found[[4, 8]].to_numpy()) == 0.5


def test_groups_are_measured_with_their_seeds():
    rows = pandas.DataFrame({"seed": 1, "size": [4, 4, 8], "loss": [1.0, 3.0, 5.0]})
    found = measured(rows, ["size"], "loss")
    assert found["size"].tolist() == [4, 8] and found["estimate"].tolist() == found["seed_1"].tolist() == [2, 5]


def test_what_is_shown_of_atlas_is_what_was_planted():
    parameters = {
        "entities": 12,
        "relations": 2,
        "values": 6,
        "documents": 300,
        "most_supporters": 100,
        "noise_share": 0.2,
    }
    world = build(Atlas(**parameters, canaries=1, repetitions=(2,), held_out=20, queries=6))
    shown = documents(world, 1)
    assert (
        len(shown) == len(shown[["language", "kind"]].drop_duplicates())
        and not shown["document"].str.contains("<").any()
    )
    asked = questions(world, 2)
    assert set(asked["language"]) == {"English", "German"}
