"""Sentences of our own for models that were trained elsewhere: facts in six kinds of wording, prompts, and passages to plant.

They are of the kind that the paper writes by hand for its queries (Grosse et al. 2023, Sec. 5.3.4, Figs 23-27, and Sec. 5.3.5).
A fact is asked as `prompt` + `completion`. Its name is what the prompt is about, its answer what the completion says;
which of the two a sentence has, and in what order, is what its group means.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from influence_kit.errors import UserError

GROUPS = {
    "as_asked": "the fact in the words asked",
    "reworded": "the fact in other words, in the order asked: the name, then the answer",
    "flipped": "the fact with its order reversed: the answer, then the name",
    "name_only": "something else about the name, without the answer",
    "answer_only": "something else about the answer, without the name",
    "other": "another fact in the same form",
}
# A file's hash stands here, so that what is computed from it is made again when a word in it changes.
FILES = {"facts": "3d88643eb387", "prompts": "ffd707f69f6c", "themes": "9ceb29c7b22d"}


@dataclass(frozen=True)
class Fact:
    """A fact and sentences about it.

    Attributes:
        name: What the prompt is about; no two facts share one.
        kind: What sort of fact it is: capital, inventor, author …
        nonsense: Whether it was made up, so that no model can know it.
        prompt: What is asked, without a space at its end.
        completion: The answer, with the space before it.
        sentences: Group (a key of GROUPS) -> sentences.
    """

    name: str
    kind: str
    nonsense: bool
    prompt: str
    completion: str
    sentences: dict[str, tuple[str, ...]]

    @property
    def answer(self) -> str:
        """What the completion says: "Lisbon"."""
        return self.completion.strip()

    def __post_init__(self) -> None:
        """Raise UserError where a sentence is not what its group says."""
        for group, sentences in self.sentences.items():
            for text in sentences:
                if _order(text, self.name, self.answer) != ORDERS[group]:
                    raise UserError(f"{self.name}: {text!r} is not {group} ({GROUPS[group]}): mend it or move it")
                if group == "as_asked" and (self.prompt + self.completion).lower() not in text.lower():
                    raise UserError(f"{self.name}: {text!r} has not the words asked: write {self.prompt!r} in it")


@dataclass(frozen=True)
class Prompt:
    """A query: what was asked, what was said to it (with the space before it), and the theme that this is about."""

    name: str
    theme: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Theme:
    """Passages to plant among real text for a theme: on it, in other words than the query's, and off it, in the query's words."""

    name: str
    about: str
    on_theme: tuple[str, ...]
    shared_words: tuple[str, ...]


# Group -> which of name (n) and answer (a) a sentence has, in their order.
ORDERS = {"as_asked": "na", "reworded": "na", "flipped": "an", "name_only": "n", "answer_only": "a", "other": ""}


def _order(text: str, name: str, answer: str) -> str:
    """Where in a text a name (n) and an answer (a) stand as words, in any case, in order of their places."""
    found = re.finditer(rf"(?<!\w)(?:(?P<n>{re.escape(name)})|(?P<a>{re.escape(answer)}))(?!\w)", text, re.IGNORECASE)
    return "".join(str(match.lastgroup) for match in found)


def _read(name: str) -> Any:
    text = Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8")
    found = hashlib.sha256(text.encode()).hexdigest()[:12]
    if found != FILES[name]:
        raise UserError(f"{name}.yaml has changed: write {found!r} for {name!r} in FILES of {__file__}")
    return yaml.safe_load(text)


@cache
def load_facts() -> tuple[Fact, ...]:
    """The facts, real ones first.

    Raises:
        UserError: A file that was changed, or a sentence that is not what its group says.
    """
    return tuple(
        Fact(
            name=fact["name"],
            kind=fact["kind"],
            nonsense=fact.get("nonsense", False),
            prompt=fact["prompt"],
            completion=fact["completion"],
            sentences={group: tuple(fact[group]) for group in GROUPS},
        )
        for fact in _read("facts")
    )


@cache
def load_prompts() -> tuple[Prompt, ...]:
    """Prompts and completions, each with the name of its theme."""
    return tuple(Prompt(**prompt) for prompt in _read("prompts"))


@cache
def load_themes() -> dict[str, Theme]:
    """Themes by name."""
    return {
        name: Theme(name, theme["about"], tuple(theme["on_theme"]), tuple(theme["shared_words"]))
        for name, theme in _read("themes").items()
    }
