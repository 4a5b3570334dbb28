"""The order stage, tiny and real: what it writes equals the library's own answer and a plain optimiser's step."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch

from influence_kit import models, score
from influence_kit.corpora.world import World, batch_of
from influence_kit.corpora.worlds.atlas import Atlas, build
from influence_kit.corpora.worlds.phrases import PARTITIONS, fact_queries, phrases
from influence_kit.engine.factors import Factors
from influence_kit.errors import UserError
from influence_kit.findings.stages.influence import influence
from influence_kit.findings.stages.order import finetuning, order
from influence_kit.findings.stages.train import train

PARAMETERS = {"fraction": 1.0, "seed": 7, "device": "cpu", "damping": 0.1, "queries": 2, "instances": 2}
PARAMETERS |= {"step": 1e-4, "rate": 3e-3, "steps": 3}


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of a tiny world, model, factors, and the stage's own."""
    root = tmp_path_factory.mktemp("order")
    folders = {name: root / name for name in ("world", "model", "influence", "order", "again")}
    for folder in folders.values():
        folder.mkdir()
    small = {"entities": 12, "relations": 2, "values": 4, "documents": 900, "most_supporters": 200, "queries": 3}
    build(Atlas(**small, canaries=1, held_out=20)).save(folders["world"])
    recipe = asdict(models.Recipe(batch_size=16, warmup_steps=5, evaluations=2, learning_rate=1e-2))
    size = {"architecture": "gpt_neox", "width": 16, "depth": 1, "device": "cpu"}
    train({**size, "recipe": recipe}, folders, folders["model"], quiet)
    fit = {"fraction": 1.0, "seed": 7, "device": "cpu", "fit": 80, "sequences": 20, "layers": "mlp", "damping": 0.1}
    influence(fit, folders, folders["influence"], quiet)
    order(PARAMETERS, folders, folders["order"], quiet)
    return folders


@pytest.fixture(scope="module")
def found(made):
    return pd.read_parquet(made["order"] / "order.parquet")


def test_a_row_for_each_query_partition_and_instance(made, found):
    world = World.load(made["world"])
    assert len(found) == 4 * len(PARTITIONS) * 2 and not found.isna().to_numpy().any()
    assert not found.duplicated(["query", "partition", "instance"]).any()
    for seen in (True, False):
        asked = set(found.loc[found["seen"] == seen, "query"])
        assert len(asked) == 2 and asked <= set(fact_queries(world, seen).tolist())


def test_influence_is_that_of_a_direct_call(made, found):
    world, model = World.load(made["world"]), models.load(made["model"])
    factors = Factors.load(made["influence"] / "factors.safetensors")
    for query, group in found.groupby("query"):
        made_alone = phrases(world, [query], 2, seed=7)
        assert made_alone["partition"].to_pylist() == group["partition"].tolist()
        direct = score(model, factors, batch_of(world.queries, [query]), batch_of(made_alone))
        np.testing.assert_allclose(group["influence"], direct.values[0].numpy(), rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(group["relatif"], direct.relatif[0].numpy(), rtol=2e-3, atol=1e-4)
        log_p, _ = models.evaluate(model, batch_of(world.queries, [query]))
        np.testing.assert_allclose(group["log_p"], float(log_p[0]), rtol=1e-4)


def test_delta_is_a_plain_optimiser_s_step_and_linear(made, found):
    world = World.load(made["world"])
    query = int(found["query"].iloc[-1])
    rows = phrases(world, [query], 2, seed=7)
    group = found[found["query"] == query]
    for n in range(0, len(group), 5):
        model = models.load(made["model"]).double()
        before, _ = models.evaluate(model, batch_of(world.queries, [query]))
        own, _ = models.evaluate(model, batch_of(rows, [n]))
        optimiser = torch.optim.SGD(model.parameters(), lr=PARAMETERS["step"])
        loss, _ = models.cross_entropy(model, *batch_of(rows, [n]).values())
        loss.backward()
        optimiser.step()
        after, _ = models.evaluate(model, batch_of(world.queries, [query]))
        # `evaluate` takes its logarithm in float32.
        assert group["delta"].iloc[n] == pytest.approx(float(after - before), abs=3e-6)
        optimiser.param_groups[0]["lr"] = PARAMETERS["rate"] - PARAMETERS["step"]
        optimiser.step()  # the rest of a first step of size `rate`, from the same gradient
        optimiser.param_groups[0]["lr"] = PARAMETERS["rate"]
        for _ in range(PARAMETERS["steps"] - 1):
            optimiser.zero_grad()
            models.cross_entropy(model, *batch_of(rows, [n]).values())[0].backward()
            optimiser.step()
        after, _ = models.evaluate(model, batch_of(world.queries, [query]))
        assert group["learned"].iloc[n] == pytest.approx(float(after - before), abs=1e-5)
        now, _ = models.evaluate(model, batch_of(rows, [n]))
        assert group["phrase_learned"].iloc[n] == pytest.approx(float(now - own), abs=1e-5)
    curvature = (found["delta"] - 2 * found["delta_half"]).abs().sum() / found["delta"].abs().sum()
    assert curvature < 0.02


def test_finetuning_on_the_fact_teaches_it_and_on_a_falsehood_unteaches_it(found):
    means = found.groupby("partition")[["delta", "learned", "phrase_learned"]].mean()
    assert means.loc["forward", "delta"] > 0 and means.loc["forward", "learned"] > 0
    assert means.loc["altered_value", "learned"] < means.loc["forward", "learned"]
    assert (means["phrase_learned"] > 0).all()


def test_scored_delta_moves_the_scored_layers_only(made):
    world, model = World.load(made["world"]), models.load(made["model"]).double()
    rows, queries, own = (
        batch_of(phrases(world, [0, 1], 1)),
        batch_of(world.queries, [0, 1]),
        np.repeat([0, 1], len(PARTITIONS)),
    )
    everything = finetuning(model, queries, rows, own, 1e-6, 1e-4, 1, tuple(name for name, _ in model.named_children()))
    np.testing.assert_allclose(everything["scored_delta"], everything["delta"], rtol=1e-3, atol=1e-9)
    layers = tuple(Factors.load(made["influence"] / "factors.safetensors").layers)
    part = finetuning(model, queries, rows, own, 1e-6, 1e-4, 1, layers)["scored_delta"]
    for name, weight in model.named_parameters():
        weight.requires_grad_(name.rsplit(".", 1)[0] in layers)
    np.testing.assert_allclose(
        part, finetuning(model, queries, rows, own, 1e-6, 1e-4, 1)["delta"], rtol=1e-3, atol=1e-9
    )
    assert np.abs(part - everything["delta"]).max() > 1e-6


def test_the_model_is_left_as_it_was(made):
    world, model = World.load(made["world"]), models.load(made["model"])
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rows = batch_of(phrases(world, [0], 1))
    finetuning(model, batch_of(world.queries, [0]), rows, np.zeros(len(PARTITIONS), int), 0.01, 0.1, 2)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_word_log_p_is_the_flipped_phrase_s_entity(made, found):
    world, model = World.load(made["world"]), models.load(made["model"])
    query = int(found["query"].iloc[0])
    rows = phrases(world, [query], 2, seed=7)
    place = rows["partition"].to_pylist().index("flipped")
    batch = batch_of(rows, [place])
    with torch.no_grad():
        log_p = model(input_ids=batch["input_ids"]).logits[0, 4].log_softmax(-1)[batch["input_ids"][0, 5]]
    entity = world.queries["input_ids"][query].as_py()[2]
    assert int(batch["input_ids"][0, 5]) == entity
    assert found["word_log_p"].iloc[place] == pytest.approx(float(log_p), abs=1e-4)


def test_same_parameters_same_bytes(made, found):
    order(PARAMETERS, made, made["again"], quiet)
    assert (made["again"] / "order.parquet").read_bytes() == (made["order"] / "order.parquet").read_bytes()


def test_a_step_of_nothing_is_refused(made):
    world, model = World.load(made["world"]), models.load(made["model"])
    rows = batch_of(phrases(world, [0], 1))
    with pytest.raises(UserError, match="step=0"):
        finetuning(model, batch_of(world.queries, [0]), rows, np.zeros(13, int), 0, 0.1, 1)
    with pytest.raises(UserError, match="steps=0"):
        finetuning(model, batch_of(world.queries, [0]), rows, np.zeros(13, int), 1e-4, 0.1, 0)
