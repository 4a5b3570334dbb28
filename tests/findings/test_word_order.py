"""Word order: phrases say what their names promise, the stage writes the library's own answer and a plain optimiser's step, and
ratios over partitions are right on tables whose answer is known."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch

from influence_kit import models, score
from influence_kit.corpora.world import World, batch_of, token_matrix
from influence_kit.corpora.worlds.atlas import Atlas, build
from influence_kit.corpora.worlds.words import listed
from influence_kit.engine.factors import Factors
from influence_kit.errors import UserError
from influence_kit.findings.common import influence, train
from influence_kit.findings.word_order import (
    PARTITIONS,
    departure,
    fact_queries,
    followed,
    means,
    middling,
    order,
    phrases,
    ratio,
)
from influence_kit.reading.words import token_texts
from influence_kit.referees.finetuning import finetuning

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


SMALL = {
    "entities": 24,
    "relations": 2,
    "values": 8,
    "documents": 2000,
    "most_supporters": 300,
    "queries": 6,
    "canaries": 1,
    "held_out": 50,
}
INSTANCES = 4
WORDS = listed("atlas")
RELATIONS = [
    {key: [pair.split("/") for pair in pairs] for key, pairs in part.items()} for part in WORDS["relations"].values()
]
# English to German (0) and back (1): what the other language says.
ABROAD = [
    {pair[there]: pair[1 - there] for relation in RELATIONS for pairs in relation.values() for pair in pairs}
    for there in (0, 1)
]
PEOPLE = {name for names in WORDS["first_names"].values() for name in names}


@pytest.fixture(
    scope="module", params=[{}, {"anchor_share": 0.0}, {"order": "both"}], ids=["plain", "no_anchors", "both"]
)
def atlas(request):
    return build(Atlas(**SMALL, **request.param))


@pytest.fixture(scope="module")
def spoken(atlas):
    asked = np.concatenate([fact_queries(atlas, True), fact_queries(atlas, False)])
    return phrases(atlas, asked, INSTANCES, seed=5)


class Stated:
    """What the training text says, from its words alone: relation words and values by relation, and the facts."""

    def __init__(self, world):
        self.names, self.facts, self.of_relation = set(), {}, {}
        for ids, facts, language in zip(
            token_matrix(world.sequences),
            np.stack(world.sequences["facts"].to_numpy(zero_copy_only=False)),
            world.sequences["language"].to_pylist(),
            strict=True,
        ):
            for place, fact in enumerate(facts):
                if language >= 0 and fact >= 0:
                    first, *words, last, _ = (world.vocabulary[t] for t in ids[2 + 6 * place : 7 + 6 * place])
                    name, value = (first, last) if first in PEOPLE else (last, first)
                    self.facts[name, language, fact % 2] = value
                    self.of_relation.setdefault((language, fact % 2), set()).add(tuple(words))


def rows_of(world, made):
    """(query's row, its words, partition, instance, phrase's words) of every phrase; words without <bos>."""
    queries = world.queries.to_pylist()
    for row in made.to_pylist():
        query = queries[row["query"]]
        length = sum(row["loss_mask"]) + 1
        words = token_texts(world, row["input_ids"][1:length])
        yield query, token_texts(world, query["input_ids"][1:6]), row["partition"], row["instance"], words


def test_every_query_has_every_partition_in_order(atlas, spoken):
    table = spoken.select(["query", "partition", "instance"]).to_pandas()
    expected = [(p, i) for p in PARTITIONS for i in range(INSTANCES)]
    for _, group in table.groupby("query", sort=False):
        assert list(zip(group["partition"], group["instance"], strict=True)) == expected


def test_shape_is_the_world_s_with_one_statement_and_padding(atlas, spoken):
    tokens, mask = token_matrix(spoken), token_matrix(spoken, "loss_mask")
    assert tokens.shape[1] == token_matrix(atlas.sequences).shape[1] == 19
    assert (mask == ((np.arange(19) >= 1) & (np.arange(19) <= 6))).all()
    assert (tokens[:, 0] == 0).all() and (tokens[:, 7:] == 0).all() and (tokens[:, 1:7] > 0).all()


def test_partitions_say_what_their_names_promise(atlas, spoken):
    stated = Stated(atlas)
    fillers = {f for row in token_matrix(atlas.sequences) for f in [atlas.vocabulary[row[1]]] if row[1] > 0}
    checked = set()
    for query, (_, name, *words, value), partition, _, phrase in rows_of(atlas, spoken):
        language, relation = query["language"], query["fact"] % 2
        lead, first, second, third, last, stop = phrase
        there = 1 - language if "translated" in partition else language
        assert stop == ".!"[there] and lead in fillers
        abroad = tuple(ABROAD[language][word] for word in words)
        own_words, other_words = stated.of_relation[language, relation], stated.of_relation[language, 1 - relation]
        checked.add(partition)
        if partition == "forward":
            assert phrase[1:5] == [name, *words, value]
        elif partition == "reworded":
            assert (first, last) == (name, value) and (second, third) in own_words - {tuple(words)}
        elif partition == "without_relation":
            assert (first, last) == (name, value) and {second, third} <= fillers
        elif partition == "entity_only":
            assert first == name and {second, third, last} <= fillers
        elif partition == "value_only":
            assert first == value and {second, third, last} <= fillers
        elif partition == "altered_entity":
            assert phrase[2:5] == [*words, value] and first != name and first in PEOPLE
            assert stated.facts.get((first, language, relation), None) != value
        elif partition == "altered_relation":
            assert (first, last) == (name, value) and (second, third) in other_words
        elif partition == "altered_value":
            assert phrase[1:4] == [name, *words] and last != value
            assert last in [pair[language] for pair in RELATIONS[relation]["values"]]  # a value of the same relation
        elif partition == "irrelevant":
            assert first != name and (second, third) in other_words
            assert stated.facts[first, language, 1 - relation] == last
        elif partition == "flipped":
            assert phrase[1:5] == [value, *words, name]
        elif partition == "flipped_without_relation":
            assert (first, last) == (value, name) and {second, third} <= fillers
        else:
            entity, result = (last, first) if partition == "translated_flipped" else (first, last)
            assert (second, third) == abroad
            assert stated.facts[entity, there, relation] == result
            assert result == ABROAD[language][value]
    assert checked == set(PARTITIONS)


def test_instances_differ_and_share_their_first_filler_across_partitions(atlas, spoken):
    leads: dict = {}
    seen: dict = {}
    for query, (own, *_), partition, instance, phrase in rows_of(atlas, spoken):
        key = (query["fact"], query["language"])
        seen.setdefault((key, partition), set()).add(tuple(phrase))
        if "translated" not in partition:
            leads.setdefault((key, instance), set()).add(phrase[0])
            assert phrase[0] != own
    assert all(len(phrases_) == INSTANCES for phrases_ in seen.values())
    assert all(len(words) == 1 for words in leads.values())


def test_seen_facts_are_stated_in_the_query_s_language_and_unseen_ones_in_the_other_only(atlas):
    language = np.array(atlas.sequences["language"].to_pylist())
    facts = np.stack(atlas.sequences["facts"].to_numpy(zero_copy_only=False))
    seen, unseen = fact_queries(atlas, True), fact_queries(atlas, False)
    assert len(seen) and len(unseen) and not set(seen) & set(unseen)
    for query in (*seen, *unseen):
        row = atlas.queries.slice(query, 1).to_pylist()[0]
        assert (facts[language == row["language"]] == row["fact"]).any() == (query in seen)
        assert (facts[language == 1 - row["language"]] == row["fact"]).any()


def test_seed_decides_and_other_queries_do_not(atlas, tmp_path):
    query = int(fact_queries(atlas)[1])
    alone = phrases(atlas, [query], 2, seed=1)
    among = phrases(atlas, [0, query], 2, seed=1)
    assert [row for row in among.to_pylist() if row["query"] == query] == alone.to_pylist()
    assert alone.to_pylist() != phrases(atlas, [query], 2, seed=2).to_pylist()
    atlas.save(tmp_path)
    assert phrases(World.load(tmp_path), [query], 2, seed=1).to_pylist() == alone.to_pylist()


def test_what_cannot_be_asked_is_refused(atlas):
    canary = atlas.queries["kind"].to_pylist().index("canary")
    with pytest.raises(UserError, match=f"query {canary} asks for no fact"):
        phrases(atlas, [canary])
    with pytest.raises(UserError, match="instances=0"):
        phrases(atlas, [0], 0)
    with pytest.raises(UserError, match="templates of 2 or more"):
        phrases(build(Atlas(**{**SMALL, "templates": 1})), [0])
    other = World("ladder", atlas.sequences, atlas.held_out, atlas.queries, atlas.vocabulary, "", atlas.parameters)
    with pytest.raises(UserError, match="'ladder'"):
        phrases(other, [0])
    words = (*atlas.vocabulary[:-1], "another")
    other = World("atlas", atlas.sequences, atlas.held_out, atlas.queries, words, "", atlas.parameters)
    with pytest.raises(UserError, match="another version"):
        phrases(other, [0])


NAMES = sorted(PARTITIONS)


def lines(values, seed=0, seen=True):
    """`values` [Q, partitions] as `read` gives them: two instances lie around each so that their mean is exact."""
    about = {"size": 100, "seed": seed, "arm": "base", "seen": seen}
    return pd.DataFrame(
        about | {"query": q, "partition": name, "instance": i, "odds": values[q, p] + (2 * i - 1) * 0.5}
        for q in range(len(values))
        for p, name in enumerate(NAMES)
        for i in range(2)
    )


def values(seed=0, queries=5):
    return np.random.default_rng(seed).normal(3, 1, (queries, len(NAMES)))


def test_instances_are_averaged_and_seeds_kept_apart():
    one, two = values(), values(seed=1)
    table = means(pd.concat([lines(one, 11), lines(two, 12), lines(two, 12, seen=False)]), 100)
    assert list(table.columns) == NAMES and table.index.names == ["seed", "query"]
    np.testing.assert_allclose(table.loc[11].to_numpy(), one)
    np.testing.assert_allclose(table.loc[12].to_numpy(), two)


def test_ratio_is_of_means_within_a_seed_and_averaged_over_seeds():
    one, two = values(), values(seed=1) * 10  # a mean over both seeds' queries would be ruled by the second
    table = means(pd.concat([lines(one, 11), lines(two, 12)]), 100)
    above, below = NAMES.index("flipped"), NAMES.index("forward")
    found = ratio(table, "flipped", "forward")
    assert found.value == pytest.approx(np.mean([v[:, above].mean() / v[:, below].mean() for v in (one, two)]))
    assert found.low < found.value < found.high and found.seeds == (11, 12)
    kept = (table["flipped"] / table["forward"]).loc[11]
    assert kept[middling(table, 11)] == kept.median()


def test_a_step_departs_from_linear_by_what_half_of_it_lacks():
    rows = pd.DataFrame({"delta": [2.0, -2.0], "delta_half": [0.9, -1.0], "seed": 11})
    assert departure(rows).value == pytest.approx(0.1 / 2)


def test_one_quantity_follows_another_by_rank():
    true = means(lines(values()), 100)
    assert followed(true**3, true).value == pytest.approx(1) and followed(-true, true).value == pytest.approx(-1)
    with pytest.raises(UserError, match="same queries"):
        followed(true.iloc[1:], true)


def test_what_is_missing_is_named():
    whole = lines(values())
    with pytest.raises(UserError, match="'delta' is no column"):
        means(whole, 100, "delta")
    with pytest.raises(UserError, match="forward"):
        means(whole[~((whole["query"] == 2) & (whole["partition"] == "forward"))], 100)
