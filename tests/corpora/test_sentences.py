"""Facts, prompts and passages of our own: what a group or a theme says of its sentences holds for each of them."""

import re
from dataclasses import replace

import pytest

from influence_kit.corpora import sentences
from influence_kit.corpora.sentences import GROUPS, load_facts, load_prompts, load_themes
from influence_kit.errors import UserError

LEAST = {"as_asked": 2, "reworded": 3, "flipped": 3, "name_only": 2, "answer_only": 2, "other": 1}
FACTS = {fact.name: fact for fact in load_facts()}


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{4,}", text.lower()))


def test_facts_are_of_many_kinds_and_some_are_made_up():
    real = [fact for fact in FACTS.values() if not fact.nonsense]
    assert len(FACTS) == len(load_facts()) and len({fact.kind for fact in real}) >= 12
    assert len(real) >= 12 and len(FACTS) - len(real) >= 4
    assert {fact.kind for fact in FACTS.values()} == {fact.kind for fact in real}


@pytest.mark.parametrize("fact", FACTS.values(), ids=lambda fact: fact.name)
def test_a_fact_has_its_sentences_in_six_groups(fact):
    assert {group: len(fact.sentences[group]) for group in GROUPS} == LEAST
    every = [text for group in GROUPS for text in fact.sentences[group]]
    assert len(set(every)) == len(every) and all(text == text.strip() and text[-1] in ".!?" for text in every)
    assert fact.sentences["as_asked"][0] == f"{fact.prompt}{fact.completion}."
    assert fact.prompt == fact.prompt.strip() and fact.completion == f" {fact.answer}"


@pytest.mark.parametrize("fact", [fact for fact in FACTS.values() if fact.nonsense], ids=lambda fact: fact.name)
def test_what_was_made_up_stands_in_no_other_fact(fact):
    rest = str([other.sentences for other in FACTS.values() if other is not fact])
    assert fact.name not in rest and fact.answer not in rest


@pytest.mark.parametrize(
    "group, text",
    [
        ("flipped", "The capital of Portugal is the city of Lisbon."),
        ("reworded", "Lisbon is the capital of Portugal."),
        ("name_only", "Portugal is not Lisbon."),
        ("answer_only", "It rained."),
        ("other", "The capital of portugal is large."),
        ("as_asked", "Portugal is governed from Lisbon."),
    ],
)
def test_a_sentence_in_the_wrong_group_is_refused(group, text):
    fact = FACTS["Portugal"]
    with pytest.raises(UserError, match=re.escape(repr(text))):
        replace(fact, sentences=fact.sentences | {group: (text,)})


def test_a_file_that_was_changed_is_refused(monkeypatch):
    monkeypatch.setitem(sentences.FILES, "facts", "0" * 12)
    load_facts.cache_clear()
    with pytest.raises(UserError, match=r"facts.yaml has changed: write '[0-9a-f]{12}'"):
        load_facts()


def test_each_prompt_has_a_theme_of_its_own():
    prompts, themes = load_prompts(), load_themes()
    assert len(prompts) >= 6 and sorted(prompt.theme for prompt in prompts) == sorted(themes)
    assert len({prompt.name for prompt in prompts}) == len(prompts)
    assert all(prompt.prompt == prompt.prompt.strip() and prompt.completion[0] == " " for prompt in prompts)


@pytest.mark.parametrize("prompt", load_prompts(), ids=lambda prompt: prompt.name)
def test_passages_share_either_the_theme_or_the_words(prompt):
    theme, asked = load_themes()[prompt.theme], words(prompt.prompt + prompt.completion)
    on_theme = [len(words(text) & asked) for text in theme.on_theme]
    shared = [len(words(text) & asked) for text in theme.shared_words]
    assert min(len(on_theme), len(shared)) >= 5 and max(on_theme) <= 4 and min(shared) >= 8
    assert all(36 <= len(text.split()) <= 60 for text in theme.on_theme + theme.shared_words)
