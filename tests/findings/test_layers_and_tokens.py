"""Layers and tokens: the stages `layers` and `maps`, tiny and real, write what direct calls give; shares of blocks and readings of
maps are right by hand, and against scores whose cause is known."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.stats import f_oneway

from influence_kit import models, score, token_scores
from influence_kit.corpora.world import World, batch_of, token_matrix
from influence_kit.corpora.worlds import ladder
from influence_kit.corpora.worlds.deep import Deep, build, marks, supporters
from influence_kit.engine.factors import Factors
from influence_kit.engine.fitting import fit_ekfac
from influence_kit.errors import UserError
from influence_kit.findings.common import influence, train
from influence_kit.findings.layers_and_tokens import (
    block_shares,
    blocks,
    by_third,
    by_token,
    centre_of_mass,
    chance,
    hit,
    largest_block,
    layers,
    maps,
    permutation_test,
    preference,
    preferred,
    read_maps,
    replacing,
    share,
    share_table,
    third_of,
    thirds_table,
    variance_explained,
)

COMMON = {"fraction": 1.0, "seed": 7, "device": "cpu", "damping": 0.1, "layers": "mlp"}
MAPS = COMMON | {"k": 2, "queries": 12, "draws": 2}
SCORES = np.array([[0.0, 1, -6, 3, 0], [2.0, 1, 1, 0, 0], [0.0] * 5])
KEY = np.array([[0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0]], bool)


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


def test_shares_read_the_top_by_all_blocks_and_add_up_with_signs():
    values = np.zeros((1, 4, 3))
    values[0, 0] = [5, 1, -1]
    values[0, 1] = [3, 3, -1]
    values[0, 2] = [0, 0, 4]  # third by the sum: outside the top half
    assert block_shares(values, top=0.5)[0] == pytest.approx([8 / 12, 4 / 12, 0])
    # With three of the four, the last block comes out above 0: 4 - 2.
    assert block_shares(values, top=0.75)[0] == pytest.approx([8 / 14, 4 / 14, 2 / 14])
    assert np.isnan(block_shares(-np.ones((1, 4, 3)), top=0.5)).all()


def test_centre_of_mass_by_hand():
    shares = np.array([[1, 0, 0, 0], [0, 0, 0, 1], [0.25] * 4, [0, 0.5, 0.5, 0]], float)
    assert centre_of_mass(shares) == pytest.approx([0.125, 0.875, 0.5, 0.5])
    spread = share_table(np.repeat(shares[:, None], 2, 1), list("abcd"), top=1.0)["spread"]
    assert spread[:2].tolist() == [0, 0] and spread[2] > spread[3] > 0


@pytest.mark.parametrize(("blocks", "sizes"), [(12, [4, 4, 4]), (9, [3, 3, 3]), (3, [1, 1, 1]), (10, [4, 3, 3])])
def test_thirds_part_the_blocks(blocks, sizes):
    assert np.bincount(third_of(blocks)).tolist() == sizes
    values = np.random.default_rng(0).normal(size=(2, 5, blocks))
    parts = by_third(values)
    np.testing.assert_allclose(sum(parts.values()), values.sum(2))
    np.testing.assert_allclose(parts["lower"], values[:, :, : sizes[0]].sum(2))


def test_two_blocks_have_no_thirds():
    with pytest.raises(UserError, match="2 block"):
        third_of(2)
    table = share_table(np.ones((3, 5, 2)), ["a", "b", "c"], top=1.0)
    assert table[["lower", "middle", "upper"]].isna().all().all() and (table["block_1"] == 0.5).all()


def test_wrong_shapes_are_refused():
    with pytest.raises(UserError, match=r"\[queries, sequences, blocks\]"):
        block_shares(np.ones((3, 4)))


def test_variance_explained_is_that_of_the_analysis_of_variance():
    rng = np.random.default_rng(1)
    groups = np.repeat(["a", "b", "c"], 8)
    values = rng.normal(size=24) + np.repeat([0, 1, 3], 8)
    f = f_oneway(*(values[groups == g] for g in "abc")).statistic
    expected = 1 - (23 / 21) * (21 / (2 * f + 21))
    assert variance_explained(values, groups) == pytest.approx(expected)
    assert variance_explained([0, 0, 1, 1], list("aabb")) == 1
    assert np.isnan(variance_explained([1, 1, 1], list("abb"))) and np.isnan(variance_explained([1, 2], list("aa")))


def test_permutation_test_knows_a_difference_from_none():
    rng = np.random.default_rng(2)
    seeds, groups = np.repeat([11, 12], 40), np.tile(np.repeat(["a", "b"], 20), 2)
    noise = rng.normal(size=80) + 100 * (seeds == 12)  # what differs between seeds is no difference of groups
    value, p, permuted = permutation_test(noise + (groups == "a"), groups, seeds, draws=300)
    assert value > 0.1 and p < 0.02 and abs(permuted.mean()) < 0.01
    value, p, _ = permutation_test(noise, groups, seeds, draws=300)
    assert value < 0.1 and p > 0.05


def test_preference_and_the_largest_block_by_hand():
    lifts = np.array([[1.0, 3, 4, 1, 0, 0], [1, 3, 2, 1, 2, 2]])
    assert preference(lifts[:, :2]) == pytest.approx(0.25) and preference(lifts[:, 2:4]) == pytest.approx(0.75)
    assert np.isnan(preference(np.zeros((2, 2))))
    assert largest_block(np.array([[0.5, 0.5, 0], [0.1, 0.7, 0.2]])) == pytest.approx(1.8)


def test_thirds_table_finds_the_third_that_was_made_to_prefer_meaning():
    world = build(
        Deep(
            documents=4000,
            held_out=60,
            scored=6,
            atlas={"entities": 24, "relations": 2, "queries": 6, "canaries": 2, "repetitions": (4,)},
            cast={"queries": 20},
        )
    )
    rows, queries = np.arange(4000), np.flatnonzero(world.queries["scored"].to_numpy(zero_copy_only=False))
    values = np.random.default_rng(3).random((len(queries), 4000, 6)) * 0.1
    tiers = ladder.tiers(world, rows)
    both = (tiers["T2"] | tiers["T0r"])[queries]
    values[:, :, 0] += both
    values[:, :, 2] += tiers["T2"][queries]
    values[:, :, 5] += both
    found = thirds_table(world, values, rows, queries, top=0.02)
    assert found["contrast"].value_counts().to_dict() == {"rule": 6, "language": 6, "persona": 6}
    rules = found[found["contrast"] == "rule"]
    kept = {
        name: preference(rules[[f"{name}_first", f"{name}_second"]].to_numpy()) for name in ("lower", "middle", "upper")
    }
    assert kept["middle"] > 0.95 and all(0.3 < kept[name] < 0.7 for name in ("lower", "upper"))


def test_predicted_is_one_token_later():
    np.testing.assert_array_equal(by_token(SCORES, "predicted")[:2], [[0, 0, 1, -6, 3], [0, 2, 1, 1, 0]])
    np.testing.assert_array_equal(by_token(SCORES, "updating"), SCORES)
    with pytest.raises(UserError, match="'next'"):
        by_token(SCORES, "next")


def test_hits_and_shares_read_the_size_of_a_score():
    np.testing.assert_array_equal(hit(by_token(SCORES, "predicted"), KEY), [1, 1, np.nan])
    np.testing.assert_array_equal(hit(SCORES, KEY), [0, 0, np.nan])
    np.testing.assert_allclose(share(by_token(SCORES, "predicted"), KEY), [0.6, 0.5, np.nan])
    np.testing.assert_array_equal(hit(SCORES, np.zeros_like(KEY)), [np.nan] * 3)


def test_chance_is_the_share_of_marked_candidates():
    candidates = np.array([[0, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 1, 0, 0]], bool)
    np.testing.assert_allclose(chance(KEY, candidates), [0.25, 0.5, 0.5])
    assert np.isnan(chance(np.zeros_like(KEY), candidates)).all()


def test_the_asked_statement_against_its_rival():
    span = np.array([[0, 1, 1, 0, 0]] * 3, bool)
    rival = np.array([[0, 0, 0, 1, 1], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(preferred(SCORES, span, rival), [1, 0.5, np.nan])
    assert np.isnan(preferred(SCORES, span, np.zeros_like(rival))).all()


def test_a_table_has_each_pair_with_a_key_once_for_each_reading():
    maps = {"ekfac": SCORES, "plain": 2 * SCORES, "other": SCORES * 0, "replaced": by_token(SCORES, "predicted")}
    key = KEY.copy()
    key[1] = False
    candidates = np.ones_like(key)
    candidates[:, 0] = False
    found = read_maps(maps, key, key, np.zeros_like(key), candidates)
    assert len(found) == 2 * 7 and set(found["pair"]) == {0, 2}
    first = found[found["pair"] == 0].set_index(["method", "alignment"])["hit"]
    assert first["ekfac", "predicted"] == first["plain", "predicted"] == first["replaced", "token"] == 1
    assert first["ekfac", "updating"] == 0 and np.isnan(first["other", "predicted"])
    assert (found["chance"] == 0.25).all()
