"""Tiny models that were trained on planted worlds, in a cache of their module."""

import pytest

from influence_kit.findings import families
from influence_kit.findings.profiles import PlantedGrid, load_profile
from influence_kit.findings.trained import Trained
from influence_kit.measures.checkpoints import READ
from tests.runner.conftest import own_cache  # noqa: F401  a cache of each test's own

RECIPE = {"batch_size": 16, "warmup_steps": 2, "evaluations": 2}
ATLAS = {"entities": 12, "relations": 2, "values": 6, "documents": 600, "most_supporters": 200, "held_out": 20}
ATLAS |= {"canaries": 1, "repetitions": [1], "queries": 2, "alone": 3}
CAST = {"documents": 600, "personas": 12, "questions": 2, "queries": 12, "scored": 5, "held_out": 20}


def models_of(corpus, tmp_path_factory, world, widths, scanned, at, **arms):
    family = {"sizes": [{"width": width, "depth": 1} for width in widths], "recipe": RECIPE}
    scan = {"fit": 60, "sequences": scanned, "path": scanned}
    grid = PlantedGrid(world=world, family=family, scan=scan, arms=arms)
    profile = load_profile("smoke", real_text=False).model_copy(update={corpus: grid})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield [Trained(planned) for planned in families.planted_grid(profile, corpus, ("base", *arms), (at,))]


@pytest.fixture(scope="module")
def atlas_models(tmp_path_factory):
    """Two sizes of one seed."""
    yield from models_of("atlas", tmp_path_factory, ATLAS, (8, 16), 90, families.END)


@pytest.fixture(scope="module")
def cast_models(tmp_path_factory):
    """One size in the imitation and in the planning world."""
    planning = {"world": {"answer_from": "planning"}}
    yield from models_of("cast", tmp_path_factory, CAST, (16,), 500, READ, planning=planning)
