"""Deep: the three worlds are in it as they are at home, share no word, and queries, supporters and keys are what the texts say."""

import numpy as np
import pytest

from influence_kit.corpora.world import World, token_matrix
from influence_kit.corpora.worlds import atlas, cast, ladder
from influence_kit.corpora.worlds.deep import KINDS, SOURCES, Deep, build, marks, supporters
from influence_kit.errors import UserError
from influence_kit.reading.words import token_texts

SMALL = {"documents": 3000, "held_out": 60, "scored": 4}
SMALL |= {
    "atlas": {"entities": 24, "relations": 2, "values": 6, "queries": 6, "canaries": 4, "repetitions": [8]},
    "cast": {"queries": 20},
}
HOME = {"atlas": atlas, "ladder": ladder, "cast": cast}


@pytest.fixture(scope="module")
def world():
    return build(Deep(**SMALL))


@pytest.fixture(scope="module")
def homes():
    return {name: HOME[name].build(part) for name, part in Deep(**SMALL).parts.items()}


def words(world, table, row) -> list[str]:
    ids, mask = token_matrix(table)[row], token_matrix(table, "loss_mask")[row]
    return token_texts(world, ids[: int(mask.nonzero()[0].max()) + 1].tolist())


def column(table, name):
    return table[name].to_numpy(zero_copy_only=False)


def test_same_seed_same_bytes_and_saved_worlds_come_back(tmp_path, world):
    world.save(tmp_path / "a")
    build(Deep(**SMALL)).save(tmp_path / "b")
    build(Deep(**SMALL, seed=1)).save(tmp_path / "c")
    files = {name: (tmp_path / name / "sequences.arrow").read_bytes() for name in "abc"}
    assert files["a"] == files["b"] != files["c"]
    loaded = World.load(tmp_path / "a")
    assert loaded.queries.equals(world.queries) and loaded.parameters["relations"] == 2


@pytest.mark.parametrize("changes", [{}, SMALL])
def test_size_and_length_are_known_without_building(changes):
    parameters = Deep(**(changes | {"documents": 6000, "atlas": changes.get("atlas", {"repetitions": (4,)})}))
    made = build(parameters)
    assert parameters.words == made.vocabulary_size == len(set(made.vocabulary))
    assert parameters.length == made.context
    assert made.sequences.num_rows == 6000


def test_each_document_is_its_world_s_own_with_padding_behind_it(world, homes):
    source, number = column(world.sequences, "source"), column(world.sequences, "number")
    assert set(source) == set(SOURCES)
    met: dict[str, set] = {name: set() for name in SOURCES}
    ids, mask = token_matrix(world.sequences), token_matrix(world.sequences, "loss_mask")
    for name, home in homes.items():
        these = source == name
        assert sorted(number[these]) == list(range(home.sequences.num_rows))
        length = token_matrix(home.sequences).shape[1]
        assert mask[these][:, :length].all() and not mask[these][:, length:].any() and not ids[these][:, length:].any()
        met[name] = set(np.unique(ids[these])) - {0}
        for row in np.flatnonzero(these)[:50]:
            theirs = token_texts(home, token_matrix(home.sequences)[number[row]].tolist())
            assert words(world, world.sequences, row) == theirs
    assert not met["atlas"] & met["ladder"] and not met["atlas"] & met["cast"] and not met["ladder"] & met["cast"]


def test_documents_of_all_worlds_lie_mixed(world):
    source = column(world.sequences, "source")
    for name, share in zip(SOURCES, (1 / 3, 5 / 12, 1 / 4)):
        assert np.mean(source == name) == pytest.approx(share, abs=1e-3)
        assert np.mean(source[:600] == name) == pytest.approx(share, abs=0.08)


def test_tiers_are_those_at_home(world, homes):
    asked = {name: np.flatnonzero(column(world.queries, "source") == name) for name in SOURCES}
    source, number = column(world.sequences, "source"), column(world.sequences, "number")
    for name, home_tiers in (("ladder", ladder.tiers), ("cast", cast.tiers)):
        here, there = home_tiers(world), home_tiers(homes[name])
        rows = np.flatnonzero(source == name)
        for tier in there:
            np.testing.assert_array_equal(here[tier][np.ix_(asked[name], rows)], there[tier][:, number[rows]])
            if tier not in ("T5",):
                assert not here[tier][asked[name]][:, source != name].any()
    for here, there in zip(atlas.supporters(world), atlas.supporters(homes["atlas"])):
        rows = np.flatnonzero(source == "atlas")
        np.testing.assert_array_equal(here[np.ix_(asked["atlas"], rows)], there[:, number[rows]])
        assert not here[asked["ladder"]].any() and not here[:, source != "atlas"].any()


def test_scored_queries_are_as_many_of_each_kind_and_answers_alone_are_targets(world):
    kind, scored = column(world.queries, "kind"), column(world.queries, "scored")
    assert set(kind) == set(KINDS)
    assert {name: int((scored & (kind == name)).sum()) for name in KINDS} == dict.fromkeys(KINDS, 4)
    language = column(world.queries, "language")
    for name in ("fact", "translation"):
        assert sorted(language[scored & (kind == name)]) == [0, 0, 1, 1]
    mask = token_matrix(world.queries, "loss_mask")
    assert (mask.sum(1)[kind != "quote"] == 1).all() and (mask.sum(1)[kind == "quote"] > 1).all()
    for row in range(0, world.queries.num_rows, 5):
        text = words(world, world.queries, row)
        said = " ".join(text[1:])
        assert said == f"{world.queries['prompt'][row]} {world.queries['completion'][row]}"


def test_supporters_are_what_the_texts_say(world):
    member, kind = supporters(world), column(world.queries, "kind")
    asked = world.queries.to_pandas()
    told = [words(world, world.sequences, row) for row in range(world.sequences.num_rows)]
    for query in range(0, world.queries.num_rows, 7):
        text = words(world, world.queries, query)
        found = np.flatnonzero(member[query])
        assert len(found) or kind[query] in ("rule", "role-play")
        if kind[query] == "fact":
            assert all(text[2] in told[row] and text[-1] in told[row] for row in found)
        elif kind[query] == "translation":
            assert all(text[2] in told[row] and text[-1] not in told[row] for row in found)
            assert (column(world.sequences, "language")[found] == 1 - asked.language[query]).all()
        elif kind[query] == "quote":
            assert all(told[row] == text for row in found) and len(found) == 8
        elif kind[query] == "role-play":
            assert all(told[row][2] == text[2] and told[row][-2] == text[-1] for row in found)
        else:
            cells = column(world.sequences, "cell")
            assert (cells[found] == asked.cell[query]).all() and (cells == asked.cell[query]).sum() == len(found)


def test_marks_are_the_answer_its_statement_and_the_other_statement(world):
    member, kind = supporters(world), column(world.queries, "kind")
    pairs = [(q, row) for q in range(len(member)) for row in np.flatnonzero(member[q])[:2]]
    queries, rows = (np.array(part) for part in zip(*pairs))
    key, span, rival = marks(world, queries, rows)
    ids = token_matrix(world.sequences)[rows]
    for pair, (query, _row) in enumerate(pairs):
        text = words(world, world.queries, query)
        said, statement = token_texts(world, ids[pair][key[pair]]), token_texts(world, ids[pair][span[pair]])
        assert (key[pair] <= span[pair]).all() and not (span[pair] & rival[pair]).any()
        if kind[query] in ("fact", "translation"):
            assert statement[0] == text[2] and statement[-1] == said[-1]
            assert (said[0] == text[-1]) == (kind[query] == "fact")
            assert rival[pair].sum() in (0, 4) and span[pair].sum() + rival[pair].sum() == 8
        elif kind[query] == "quote":
            assert said == text[-len(said) :] and not rival[pair].any()
        else:
            assert len(said) == 1 and statement[-1] == said[0] and not rival[pair].any()
            assert said[0] == text[-1] or kind[query] == "rule"
    nothing = marks(world, queries[:5], np.roll(rows, len(rows) // 2)[:5])
    wrong = ~member[queries[:5], np.roll(rows, len(rows) // 2)[:5]]
    assert wrong.any() and not any(part[wrong].any() for part in nothing)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"mix": (0.5, 0.5, 0.5)}, "mix="),
        ({"scored": 1}, "scored=1"),
        ({"documents": 3}, "documents=3"),
        ({"held_out": 1}, "held_out=1"),
        ({"atlas": {"seed": 3}}, "atlas.seed"),
        ({"atlas": {"order": "reverse"}}, "atlas.order='reverse'"),
        ({"cast": {"answer_from": "planning"}}, "cast.answer_from='planning'"),
        ({"ladder": {"shown_share": 1.0}}, "shown_share=1.0"),
    ],
)
def test_bad_parameters_are_refused_by_name(changes, word):
    with pytest.raises(UserError) as error:
        Deep(**{**SMALL, **changes})
    assert word in str(error.value)
