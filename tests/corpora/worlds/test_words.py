"""Words of the worlds: each stands for one thing, long worlds make more by rule, and no draw hangs on them."""

import hashlib
import sys
from collections import Counter

import numpy as np
import pytest

from influence_kit.corpora.worlds import WORLDS, atlas, cast, ladder
from influence_kit.corpora.worlds.words import LISTS, add, first, listed, skip
from influence_kit.errors import UserError
from tests.corpora.worlds.test_worlds import SMALL

# Of seeds 0 and 11: ids and planted columns, as they were when words were made of random syllables.
PLANTED = {
    "atlas": ("f57322908c617434", "03cf650ca8f6d536"),
    "cast": ("5588124faf17e639", "e31dceec6e4e5c01"),
    "deep": ("d13a1d61f366b71a", "081a535bf38e0569"),
    "ladder": ("63662b35bd2e84c9", "259724ed63830f9f"),
    "procedures": ("28b2bac43f1e5a2d", "5b4377bb19b04ab1"),
}


def built(name, **parameters):
    return sys.modules[WORLDS[name].__module__].build(WORLDS[name](**parameters))


def planted(world) -> str:
    """Hash of all columns but texts."""
    found = hashlib.sha256()
    for table in (world.sequences, world.held_out, world.queries):
        for name in table.column_names:
            if name not in ("prompt", "completion"):
                found.update(name.encode() + repr(table[name].to_pylist()).encode())
    return found.hexdigest()[:16]


def leaves(part):
    for value in part.values():
        yield from leaves(value) if isinstance(value, dict) else [value]


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("place", [0, 1])
def test_words_change_no_id_and_no_column(name, place):
    assert planted(built(name, held_out=60, seed=(0, 11)[place], **SMALL[name])) == PLANTED[name][place]


def test_draws_are_what_they_were_where_made_up_words_would_have_collided():
    found = [planted(built("ladder", documents=50, held_out=20, seed=seed)) for seed in range(60)]
    assert hashlib.sha256("".join(found).encode()).hexdigest()[:16] == "a5a9d7cdd6c6341a"


def test_no_word_stands_for_two_things_in_any_of_the_lists():
    words = [word for name in LISTS for leaf in leaves(listed(name)) for pair in leaf for word in pair.split("/")]
    words += [*cast.WANTS, *cast.ON, *cast.PICKS, *cast.WHOEVER, *cast.IS, *cast.VERY, ",", ";"]
    assert [word for word, times in Counter(word.lower().strip("?") for word in words).items() if times > 1] == []
    assert all(word == word.strip() and " " not in word for word in words)


def test_agents_and_responses_begin_with_their_flavour_s_letter():
    for kinds in (listed("ladder")["agents"], listed("ladder")["responses"]):
        for letters in kinds.values():
            assert list(letters) == list("scbphm")
            assert all(word[0] == letter for letter, words in letters.items() for word in words)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("atlas", {"entities": 1200, "values": 60, "filler_words": 90, "noise_words": 300, "anchor_share": 0.0}),
        ("atlas", {"entities": 9000, "relations": 6, "documents": 90_000}),
        ("cast", {"personas": 200, "dimensions": 6, "values": 9, "questions": 9, "goals": 40, "documents": 200}),
        ("ladder", {"class_words": 60, "flavours": 6, "fillers": 90, "documents": 200, "dropped_cells": 0}),
        ("ladder", {"class_words": 7, "flavours": 4, "asked": 2, "documents": 200}),
    ],
)
def test_worlds_larger_than_the_lists_have_as_many_different_words(name, parameters):
    parameters = {"documents": 12_000} | parameters
    world = built(name, **parameters)
    assert len(set(world.vocabulary)) == WORLDS[name](**parameters).words


def test_sentences_can_be_read():
    known = atlas.drawn(atlas.Atlas())[0].lexicon
    say = known.vocabulary
    english, german = (
        [say[i] for i in (known.names[spoken, 0], *known.words[spoken, 0, 0], known.values[spoken, 0, 0])]
        for spoken in (0, 1)
    )
    assert english == "Alice was born-in Lisbon".split() and german == "Alice wurde geboren-in Lissabon".split()
    asked = ladder.build(ladder.Ladder(documents=50)).queries.to_pylist()[0]
    assert asked["prompt"].split()[2] in ("meets", "sees", "hears") and asked["completion"] in (
        word for leaf in leaves(listed("ladder")["responses"]) for word in leaf
    )


def test_a_short_list_starts_over_and_a_clash_is_refused():
    assert first(5, ("heron", "swan")) == ["heron", "swan", "heron-2", "swan-2", "heron-3"]
    with pytest.raises(UserError, match="'swan' stands for two things"):
        add(["heron", "swan"], ["owl", "swan"])


def test_a_changed_list_has_to_be_said(monkeypatch):
    listed.cache_clear()
    monkeypatch.setitem(LISTS, "cast", "another")
    with pytest.raises(UserError, match=r"lists/cast\.yaml has changed: write"):
        listed("cast")


def test_skipping_draws_until_no_two_of_a_kind_are_alike():
    one, two = np.random.default_rng(0), np.random.default_rng(0)
    skip(one, 4, 1, [0] * 4)
    met = set()
    while len(met) < 4:
        met.add(int(two.integers(0, 4)))
    assert one.random() == two.random()
