"""The stages `layers` and `maps`, tiny and real: what they write equals direct calls and scores made anew."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from influence_kit import models, score, token_scores
from influence_kit.corpora.world import World, batch_of, token_matrix
from influence_kit.corpora.worlds.deep import Deep, build, marks, supporters
from influence_kit.engine.factors import Factors
from influence_kit.engine.fitting import fit_ekfac
from influence_kit.errors import UserError
from influence_kit.findings.stages.influence import influence
from influence_kit.findings.stages.layers import blocks, layers
from influence_kit.findings.stages.maps import maps, replacing
from influence_kit.findings.stages.train import train

COMMON = {"fraction": 1.0, "seed": 7, "device": "cpu", "damping": 0.1, "layers": "mlp"}
MAPS = COMMON | {"k": 2, "queries": 12, "draws": 2}


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of a tiny world, a model of three blocks, its factors and scan, and what the stages make of them."""
    root = tmp_path_factory.mktemp("deep")
    folders = {name: root / name for name in ("world", "model", "influence", "layers", "some", "maps", "again")}
    for folder in folders.values():
        folder.mkdir()
    of_atlas = {"entities": 12, "relations": 2, "values": 4, "queries": 4, "canaries": 2, "repetitions": (16,)}
    build(Deep(documents=1500, held_out=30, scored=4, atlas=of_atlas, cast={"queries": 12})).save(folders["world"])
    recipe = asdict(models.Recipe(batch_size=32, warmup_steps=5, evaluations=2, learning_rate=1e-2))
    size = {"architecture": "gpt_neox", "width": 16, "depth": 3, "device": "cpu"}
    train({**size, "recipe": recipe}, folders, folders["model"], quiet)
    influence(COMMON | {"fit": 80, "sequences": 600}, folders, folders["influence"], quiet)
    layers(COMMON, folders, folders["layers"], quiet)
    layers(COMMON | {"sequences": 50}, folders, folders["some"], quiet)
    maps(MAPS, folders, folders["maps"], quiet)
    return folders


@pytest.fixture(scope="module")
def parts(made):
    world, model = World.load(made["world"]), models.load(made["model"])
    return world, model, Factors.load(made["influence"] / "factors.safetensors")


def test_blocks_sum_to_the_scan_s_scores(made):
    scan = load_file(made["influence"] / "scores.safetensors")
    found = load_file(made["layers"] / "scores.safetensors")
    assert found["layer_values"].shape == (*scan["values"].shape, 3)
    np.testing.assert_array_equal(found["rows"], scan["rows"])
    np.testing.assert_allclose(found["layer_values"].sum(2), scan["values"], rtol=1e-3, atol=1e-4)
    some = load_file(made["some"] / "scores.safetensors")
    assert len(some["rows"]) == 50
    columns = np.searchsorted(scan["rows"], some["rows"])
    np.testing.assert_allclose(some["layer_values"], found["layer_values"][:, columns], rtol=1e-3, atol=1e-4)


def test_a_block_is_what_its_own_layers_score(made, parts):
    world, model, factors = parts
    found = load_file(made["some"] / "scores.safetensors")
    own = Factors({name: layer for name, layer in factors.layers.items() if ".1." in name})
    assert len(own.layers) == 2
    direct = score(model, own, batch_of(world.queries, found["queries"]), batch_of(world.sequences, found["rows"]))
    np.testing.assert_allclose(found["layer_values"][..., 1], direct.values.numpy(), rtol=1e-3, atol=1e-4)


def test_blocks_are_numbered_from_the_bottom():
    names = ["h.0.mlp.up", "h.0.mlp.down", "h.2.mlp.up", "h.10.mlp.up"]
    assert blocks(names).tolist() == [0, 0, 1, 2]
    with pytest.raises(UserError, match="'mlp.up'"):
        blocks(["mlp.up"])


def test_maps_are_of_the_strongest_supporters_and_equal_direct_calls(made, parts):
    world, model, factors = parts
    found, scan = (
        load_file(made["maps"] / "maps.safetensors"),
        load_file(made["influence"] / "scores.safetensors"),
    )
    assert len(set(found["queries"])) <= 12 and len(found["rows"]) > 12
    member = supporters(world, scan["rows"])
    plain = fit_ekfac(model, batch_of(world.sequences, [0]), method="identity")
    for query in sorted(set(found["queries"]))[:4]:
        these = np.flatnonzero(found["queries"] == query)
        place = int(np.flatnonzero(scan["queries"] == query)[0])
        best = np.sort(scan["values"][place][member[query]])[::-1][:2]
        np.testing.assert_allclose(np.sort(found["values"][these])[::-1], best)
        asked, rows = batch_of(world.queries, [query]), batch_of(world.sequences, found["rows"][these])
        direct = token_scores(model, factors, asked, rows)
        np.testing.assert_allclose(found["ekfac"][these], direct.numpy(), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found["ekfac"][these].sum(1), found["values"][these], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(
            found["plain"][these], token_scores(model, plain, asked, rows, 0.0).numpy(), rtol=1e-3, atol=1e-5
        )


def test_the_other_map_is_of_another_query_of_the_kind(made, parts):
    world, model, factors = parts
    found, kind = load_file(made["maps"] / "maps.safetensors"), world.queries["kind"].to_pylist()
    language, asked = world.queries["language"].to_pylist(), sorted(set(found["queries"].tolist()))
    told = found["other"].any(1)
    assert told.any()
    for pair in np.flatnonzero(told)[::3]:
        query, row = int(found["queries"][pair]), batch_of(world.sequences, [found["rows"][pair]])
        alike = [q for q in asked if q != query and (kind[q], language[q]) == (kind[query], language[query])]
        tried = [token_scores(model, factors, batch_of(world.queries, [q]), row)[0].numpy() for q in alike]
        assert any(np.allclose(found["other"][pair], one, rtol=1e-3, atol=1e-4) for one in tried)


def test_replacing_is_the_fall_of_the_score_and_nothing_behind_the_end(made, parts):
    world, model, factors = parts
    query = int(np.flatnonzero(np.array(world.queries["kind"].to_pylist()) == "rule")[0])
    rows = np.flatnonzero(np.array(world.sequences["source"].to_pylist()) == "ladder")[:2]
    asked, told = batch_of(world.queries, [query]), batch_of(world.sequences, rows)
    # With two tokens in the pool and one of them in place, the replacement is known.
    pools = [np.array([int(row[3]), int(row[5])]) for row in told["input_ids"]]
    fall = replacing(model, factors, asked, told, pools, 1, 0.1, np.random.default_rng(0))
    assert fall.shape == told["input_ids"].shape and not fall[:, 0].any() and not fall[:, 7:].any()
    before = score(model, factors, asked, told).values[0]
    for place, taken in ((3, 5), (5, 3)):
        changed = {name: tensor.clone() for name, tensor in told.items()}
        changed["input_ids"][:, place] = changed["input_ids"][:, taken]
        after = score(model, factors, asked, changed).values[0]
        torch.testing.assert_close(fall[:, place], before - after, rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="replace tokens with"):
        replacing(model, factors, asked, told, [np.array([3])] * 2, 1, 0.1, np.random.default_rng(0))


def test_keys_of_the_maps_can_be_read(made, parts):
    world = parts[0]
    found = load_file(made["maps"] / "maps.safetensors")
    key, span, _ = marks(world, found["queries"], found["rows"])
    assert key.any(1).all() and (key <= span).all()
    assert (key <= token_matrix(world.sequences, "loss_mask")[found["rows"]]).all()


def test_same_parameters_same_bytes(made):
    maps(MAPS, made, made["again"], quiet)
    name = "maps.safetensors"
    assert (made["again"] / name).read_bytes() == (made["maps"] / name).read_bytes()


def test_nothing_to_look_at_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="k=0"):
        maps(MAPS | {"k": 0}, made, tmp_path, quiet)
