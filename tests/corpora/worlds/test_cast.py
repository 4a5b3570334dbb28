"""Cast: every document says what its columns say, each world has one source for its answers, dropping touches nothing else."""

import numpy as np
import pytest

from influence_kit.corpora.world import World, batch_of, token_matrix
from influence_kit.corpora.worlds.cast import KINDS, ON, PICKS, WANTS, WHOEVER, WORLDS, Cast, build, tiers
from influence_kit.corpora.worlds.words import listed
from influence_kit.errors import UserError
from influence_kit.reading.words import token_texts

SMALL = {"personas": 12, "documents": 3000, "held_out": 60, "queries": 60, "scored": 10, "goals": 5, "questions": 3}
PARTS = listed("cast")["dimensions"]
ACTIONS = [word for part in PARTS.values() for word in part["actions"]]
DIMENSION = {word: name for name, part in PARTS.items() for words in part.values() for word in words}
SOURCES = {"imitation": "demonstrations", "description": "descriptions", "planning": "planners"}


def make(answer_from="imitation", **changes) -> World:
    return build(Cast(**{**SMALL, "answer_from": answer_from, **changes}))


@pytest.fixture(scope="module", params=WORLDS)
def world(request):
    return make(request.param)


def column(table, name):
    return table[name].to_numpy(zero_copy_only=False)


def texts(world, table):
    return [token_texts(world, row) for row in token_matrix(table).tolist()]


def is_question(word):
    return word.endswith("?")


def parse(words):
    """(kind, {what: word}) of a document, read from its words alone."""
    body = words[2:-1]
    if "?" not in "".join(body):
        return "description", {"persona": body[0], "trait": body[3]}
    if body[1] in WANTS and body[4] in ON and body[6] in PICKS:
        said = {"goal": body[2], "question": body[5], "action": body[7]}
        return ("planner", said) if body[0] in WHOEVER else ("demonstration", {**said, "persona": body[0]})
    named = {"persona": str.istitle, "goal": lambda w: w in listed("cast")["goals"], "question": is_question}
    found = {what: next(word for word in body if test(word)) for what, test in named.items()}
    found["action"] = next(word for word in body if word in ACTIONS)
    return "neutral", found


def parsed(world, table):
    return [parse(words) for words in texts(world, table)]


def asked_words(world):
    """{what: word} of each query, its completion as the action."""
    found = []
    for prompt, completion in zip(world.queries["prompt"].to_pylist(), world.queries["completion"].to_pylist()):
        _, persona, _, goal, _, _, question, _ = prompt.split()
        found.append({"persona": persona, "goal": goal, "question": question, "action": completion})
    return found


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    files = {}
    for name, made in (("a", make()), ("b", make()), ("c", make(seed=1))):
        made.save(tmp_path / name)
        files[name] = [(tmp_path / name / f).read_bytes() for f in ("sequences.arrow", "queries.arrow", "world.json")]
    assert files["a"] == files["b"] and files["a"][0] != files["c"][0]


def test_saved_world_comes_back_and_sizes_are_foretold(tmp_path, world):
    world.save(tmp_path)
    loaded = World.load(tmp_path)
    assert loaded.sequences.equals(world.sequences) and loaded.queries.equals(world.queries)
    cast = Cast(**{**loaded.parameters, "mix": tuple(loaded.parameters["mix"])})
    assert (loaded.context, loaded.vocabulary_size) == (cast.length, cast.words)
    assert len(set(loaded.vocabulary)) == cast.words


def test_columns_say_what_the_words_say(world):
    """One word for each id and one id for each word, in every kind of document and in queries."""
    for table in (world.sequences, world.held_out):
        kinds, ids = (
            column(table, "kind"),
            {name: column(table, name) for name in ("persona", "goal", "question", "action")},
        )
        words_of: dict = {}
        for row, (kind, said) in enumerate(parsed(world, table)):
            assert kind == kinds[row]
            for what, values in ids.items():
                assert (values[row] >= 0) == (what in said)
                if what in said:
                    words_of.setdefault(what, {}).setdefault(int(values[row]), set()).add(said[what])
        for of in words_of.values():
            assert all(len(words) == 1 for words in of.values())
            assert len(set.union(*of.values())) == len(of)


def test_mix_is_exact_and_shuffled():
    kinds = column(make(mix=(0.3, 0.2, 0.35, 0.15)).sequences, "kind")
    assert [int((kinds == kind).sum()) for kind in KINDS] == [900, 600, 1050, 450]
    first = [int((kinds[:1000] == kind).sum()) for kind in KINDS]
    np.testing.assert_allclose(first, [300, 200, 350, 150], atol=50)


def test_answers_follow_the_world_s_rule_and_planners_one_rule(world):
    """The trait of the persona decides, or goal and question do; read from words, and the other does not decide."""
    by_trait, by_pair, planned, traits = {}, {}, {}, {}
    documents = parsed(world, world.sequences)
    answers = [said for kind, said in documents if kind == "demonstration"] + asked_words(world)
    for said in answers:
        by_trait.setdefault((said["persona"], DIMENSION[said["question"]]), set()).add(said["action"])
        by_pair.setdefault((said["goal"], said["question"]), set()).add(said["action"])
    for kind, said in documents:
        if kind == "planner":
            planned.setdefault((said["goal"], said["question"]), set()).add(said["action"])
        if kind == "description":
            traits.setdefault((said["persona"], DIMENSION[said["trait"]]), set()).add(said["trait"])
    assert len(planned) == 5 * 9 and all(len(actions) == 1 for actions in planned.values())
    assert all(len(found) == 1 for found in traits.values())  # one trait a persona and dimension
    one_by_trait = np.mean([len(actions) == 1 for actions in by_trait.values()])
    one_by_pair = np.mean([len(actions) == 1 for actions in by_pair.values()])
    if world.parameters["answer_from"] == "planning":
        assert one_by_pair == 1 and one_by_trait < 0.5
        assert all(planned[pair] == actions for pair, actions in by_pair.items())
    else:
        assert one_by_trait == 1 and one_by_pair < 0.5


def test_each_answer_has_one_source(world):
    """What is asked is never demonstrated; its persona is demonstrated or described as the world wants it."""
    kinds, documents = column(world.sequences, "kind"), parsed(world, world.sequences)
    shown = [said for kind, said in documents if kind == "demonstration"]
    triples = {(said["persona"], said["goal"], said["question"]) for said in shown}
    persona_questions = {(said["persona"], said["question"]) for said in shown}
    persona_dimensions = {(said["persona"], DIMENSION[said["question"]]) for said in shown}
    pairs = {(said["goal"], said["question"]) for said in shown}
    planned = {(said["goal"], said["question"]) for kind, said in documents if kind == "planner"}
    described = {said["persona"] for kind, said in documents if kind == "description"}
    queries = asked_words(world)
    assert len(queries) == 60 and set(kinds) == set(KINDS)
    for said in queries:
        name, goal, question = said["persona"], said["goal"], said["question"]
        assert (name, goal, question) not in triples
        if world.parameters["answer_from"] == "imitation":
            assert (name, question) not in persona_questions and (name, DIMENSION[question]) in persona_dimensions
            assert name not in described
        elif world.parameters["answer_from"] == "description":
            assert name in described and not any(name == other for other, _ in persona_questions)
        else:
            assert (goal, question) not in pairs and (goal, question) in planned
            assert name in described and (name, question) in persona_questions


def test_query_mask_marks_the_action_and_nothing_else(world):
    batch = batch_of(world.queries)
    assert (batch["loss_mask"].sum(1) == 1).all()
    completions = [world.vocabulary[int(t)] for t in batch["input_ids"][batch["loss_mask"]]]
    assert completions == world.queries["completion"].to_pylist()
    assert column(world.queries, "scored").sum() == 10
    for words, prompt in zip(texts(world, world.queries), world.queries["prompt"].to_pylist()):
        assert " ".join(words[1:9]) == prompt and words[10] == "<bos>"


def tier_by_reading(kind, said, query, same_trait):
    """The tier of one document for one query, from their words; `same_trait`: words of traits of the query's persona."""
    shares = {what: said.get(what) == query[what] for what in query}
    both, one = shares["goal"] and shares["question"], shares["goal"] or shares["question"]
    persona, action = shares["persona"], shares["action"]
    if kind == "demonstration":
        if action and one:
            return "demo_wish_action"
        if action:
            return "demo_persona_action" if persona else "demo_action"
        return "demo_persona" if persona else "demo_rest"
    if kind == "planner":
        if both:
            return "planner_pair_action" if action else "planner_pair"
        if action and one:
            return "planner_goal_action" if shares["goal"] else "planner_question_action"
        return "planner_action" if action else "planner_rest"
    if kind == "description":
        asked = said["trait"] in same_trait
        if persona:
            return "description_persona_dimension" if asked else "description_persona"
        return "description_trait" if asked else "description_rest"
    if persona and action:
        return "neutral_persona_action"
    if both and action:
        return "neutral_pair_action"
    return "neutral_action" if action else "neutral_rest"


def test_tiers_agree_with_a_reading_of_the_texts(world):
    rows = np.arange(0, 3000, 3)
    found = tiers(world, rows)
    documents = parsed(world, world.sequences.take(rows))
    # The traits' words by (dimension, value) are read from all descriptions; which one a query asks for is its planted truth.
    word = {}
    for (kind, said), dimension, trait in zip(
        parsed(world, world.sequences), column(world.sequences, "dimension"), column(world.sequences, "trait")
    ):
        if kind == "description":
            word[int(dimension), int(trait)] = said["trait"]
    assert (sum(member.astype(int) for member in found.values()) == 1).all()
    asked = zip(column(world.queries, "dimension"), column(world.queries, "trait"))
    for q, (query, (dimension, trait)) in enumerate(zip(asked_words(world), asked)):
        expected = [tier_by_reading(kind, said, query, {word[int(dimension), int(trait)]}) for kind, said in documents]
        for name, member in found.items():
            np.testing.assert_array_equal(member[q], np.array(expected) == name, err_msg=name)
    assert all(tiers(world)[name].shape == (60, 3000) for name in found)


def test_supporting_tier_is_there_and_contradicting_ones_are_not(world):
    size = {name: int(member.sum()) for name, member in tiers(world).items()}
    answer_from = world.parameters["answer_from"]
    assert (size["demo_persona_action"] > 0) == (answer_from != "description")
    assert (size["description_persona_dimension"] > 0) == (answer_from != "imitation")
    assert (size["planner_pair"] == 0) == (answer_from == "planning") and size["planner_pair_action"] > 0


CASES = [
    (name, dropped)
    for name in WORLDS
    for dropped in ("demonstrations", "descriptions", "planners", "random")
    if (name, dropped) not in {("imitation", "descriptions"), ("description", "demonstrations")}
]


@pytest.mark.parametrize(("answer_from", "dropped"), CASES)
def test_dropping_replaces_the_treated_half_in_place_and_nothing_else(answer_from, dropped):
    base, made = make(answer_from), make(answer_from, dropped=dropped)
    source = SOURCES[answer_from]
    replaced = column(made.sequences, "replaced")
    kept = np.flatnonzero(~replaced)
    assert made.sequences.take(kept).equals(base.sequences.take(kept)) and made.held_out.equals(base.held_out)
    assert (column(made.sequences, "kind")[replaced] == "neutral").all() and not column(
        base.sequences, "replaced"
    ).any()
    without = [name for name in base.queries.column_names if name != "treated"]
    assert made.queries.select(without).equals(base.queries.select(without))
    treated = column(made.queries, "treated")
    assert 0.3 < treated.mean() < 0.7
    if dropped in (source, "random"):
        np.testing.assert_array_equal(treated, column(base.queries, "treated"))

    kind = (source if dropped == "random" else dropped)[:-1]
    unit = ("goal", "question") if kind == "planner" else ("persona",)
    queries = asked_words(base)
    units = [tuple(said[name] for name in unit) for said in queries]
    gone = [said for (_, said), was in zip(parsed(base, base.sequences), replaced) if was]
    assert all(k == kind for k in column(base.sequences, "kind")[replaced])
    left = {tuple(said[name] for name in unit) for k, said in parsed(made, made.sequences) if k == kind}
    gone_units = {tuple(said[name] for name in unit) for said in gone}
    if dropped == "random":
        assert len(gone) == column(make(answer_from, dropped=source).sequences, "replaced").sum() > 0
        assert not gone_units & set(units)
    else:
        assert not gone_units & left  # all of a treated unit's documents went
        for one, is_treated in zip(units, treated):
            assert (one in gone_units) == is_treated and (one in left) == (not is_treated)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer_from": "magic"}, "answer_from='magic'"),
        ({"dropped": "neutral"}, "dropped='neutral'"),
        ({"dropped": "descriptions"}, "queried personas have none"),
        ({"answer_from": "description", "dropped": "demonstrations"}, "queried personas have none"),
        ({"mix": (0.5, 0.5, 0.5, 0.0)}, "mix="),
        ({"mix": (0.5, 0.5)}, "mix="),
        ({"unseen_share": 1.0}, "unseen_share=1.0"),
        ({"dimensions": 7}, "dimensions=7"),
        ({"scored": 61}, "scored=61"),
        ({"personas": 1}, "personas=1"),
        ({"queries": 5000}, "only .* can be asked"),
        ({"unseen_share": 0.9, "dropped": "random"}, "cannot be dropped"),
    ],
)
def test_impossible_worlds_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        make(**change)
