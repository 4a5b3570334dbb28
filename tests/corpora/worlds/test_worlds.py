"""What all planted worlds have in common: they say beforehand how large they will be, and what they ask."""

import sys
from dataclasses import asdict

import pyarrow.compute as pc
import pytest

from influence_kit.corpora.world import World
from influence_kit.corpora.worlds import WORLDS

SMALL = {
    "atlas": {"entities": 60, "values": 8, "documents": 3000, "canaries": 2, "anchor_share": 0.4, "queries": 10},
    "cast": {"documents": 2000, "queries": 200},
    "deep": {"documents": 36_000, "scored": 4, "atlas": {"anchor_share": 0.5}},
    "ladder": {"documents": 2000},
    "procedures": {"documents": 2000},
}


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_is_as_large_as_its_parameters_say_and_asks_what_they_say(name, tmp_path):
    blueprint = WORLDS[name](held_out=60, **SMALL[name])
    sys.modules[WORLDS[name].__module__].make(asdict(blueprint), {}, tmp_path, None)
    world = World.load(tmp_path)
    assert world.name == name
    assert (world.sequences.num_rows, world.context) == (blueprint.documents, blueprint.length)
    assert world.vocabulary_size == blueprint.words == len(set(world.vocabulary))
    kinds = set(world.queries["kind"].to_pylist())
    assert kinds - set(blueprint.asks) == ({"canary"} if name == "atlas" else set()) and kinds >= set(blueprint.asks)
    assert 0 < pc.sum(world.queries["scored"]).as_py() <= world.queries.num_rows
