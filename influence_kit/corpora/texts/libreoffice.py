"""Aligned paragraphs of LibreOffice's help in many languages: Debian packages, fetched, never shipped."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa

from influence_kit import packages as debian
from influence_kit.corpora.texts.paragraphs import paragraphs
from influence_kit.errors import UserError

LANGUAGES = ("en-us", "de", "ko", "tr", "zh-cn")
REFERENCE = "en-us"
# One Han or Hangul character carries about what two to three Latin letters do.
DENSE = {"ja", "ko", "zh-cn", "zh-tw"}
DENSE_SHARE = 0.375

_PARAGRAPH = re.compile(r"<p\b([^>]*)>(.*?)</p>", re.DOTALL)
_ATTRIBUTE = {name: re.compile(rf'\b{name}="([^"]*)"') for name in ("id", "class")}
_NOT_PROSE = ("code", "image", "related")
_WORD = re.compile(r"[a-z]{3,}")


class _Plain(HTMLParser):
    """The text of a paragraph's markup. Of alternatives for several systems (`switch` spans) one is kept."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, Any]] = []  # ("switch", its alternatives), ("alternative", its id), ("span", None)
        self.text: list[list[str]] = [[]]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        attribute = dict(attributes)
        if tag in ("br", "img"):
            self.text[-1].append(" ")
        elif tag in ("sup", "sub"):
            self.text[-1].append("^" if tag == "sup" else "_")  # all in formulas: without a mark x² would read x2
        elif tag == "span" and (attribute.get("class") or "").startswith("switch"):
            self.open.append(("switch", []))
        elif tag == "span" and "hidden" in attribute:
            self.open.append(("alternative", attribute.get("id") or ""))
            self.text.append([])
        elif tag == "span":
            self.open.append(("span", None))

    def handle_endtag(self, tag: str) -> None:
        if tag != "span" or not self.open:
            return
        kind, value = self.open.pop()
        if kind == "alternative":
            text = "".join(self.text.pop())
            switch = next((v for k, v in reversed(self.open) if k == "switch"), None)
            if switch is None:
                self.text[-1].append(text)
            else:
                switch.append((value, text))
        elif kind == "switch":
            kept = [(name, text) for name, text in value if not name.startswith("MAC")]
            default = [text for name, text in kept if name.startswith("default")] or [text for _, text in kept]
            self.text[-1].extend(default[:1])

    def handle_data(self, data: str) -> None:
        self.text[-1].append(data)


@lru_cache(maxsize=100_000)  # the help repeats its shared paragraphs on many pages
def _plain(markup: str) -> str:
    if "<" in markup or "&" in markup:
        parser = _Plain()
        parser.feed(markup)
        parser.close()
        markup = "".join("".join(part) for part in parser.text)
    return " ".join(markup.replace("\u00ad", "").split())


def _help_paragraphs(deb: Path) -> dict[str, str]:
    """{page#paragraph: text} of a help package. An id that names different texts on one page is left out."""
    found: dict[str, str] = {}
    ambiguous = set()
    for name, content in debian.members(deb, ".html"):
        page = re.fullmatch(r".*/help/[^/]+/text/(.+)\.html", name)
        if page is None:
            continue
        for attributes, markup in _PARAGRAPH.findall(content.decode("utf-8", errors="replace")):
            given = {key: pattern.search(attributes) for key, pattern in _ATTRIBUTE.items()}
            if given["id"] is None or any(word in given["class"][1] for word in _NOT_PROSE if given["class"]):
                continue
            key, text = f"{page[1]}#{given['id'][1]}", _plain(markup)
            if found.setdefault(key, text) != text:
                ambiguous.add(key)
    if not found:
        raise UserError(f"{deb} holds no help pages (no help/<language>/text/*.html); give a libreoffice-help package")
    return {key: text for key, text in found.items() if key not in ambiguous}


def _is_prose(text: str, shortest: int, longest: int) -> bool:
    """Of the wanted length in characters, mostly letters, and free of control and replacement characters."""
    if not shortest <= len(text) <= longest:
        return False
    letters = sum(character.isalpha() or character == " " for character in text)
    return letters >= 0.7 * len(text) and not any(unicodedata.category(c) == "Cc" or c == "\ufffd" for c in text)


def _is_untranslated(english: str, text: str) -> bool:
    """More than half of the English words stand in the other language's paragraph too: a copy, whole or in part."""
    words, kept = _WORD.findall(english.lower()), set(_WORD.findall(text.lower()))
    return english == text or sum(word in kept for word in words) > 0.5 * len(words)


def libreoffice_help(
    languages: Sequence[str], folder: Path, min_chars: int = 40, max_chars: int = 300, download: bool = True
) -> pa.Table:
    """Aligned paragraphs of LibreOffice's help (Debian packages `libreoffice-help-<language>`, licence MPL-2.0).

    Kept are paragraphs of `min_chars` to `max_chars` characters in English and in the language (Chinese, Japanese,
    Korean: from 3/8 of `min_chars`), that are prose and translated. No text stands twice within a language: where one
    English text stands in several places, the first names the pair. English rows are those with at least one
    translation among `languages` (all when English alone is asked for).

    Args:
        languages: Package suffixes ("en-us", "de", "ko", "tr", "zh-cn", ...). English is always read, since it tells
            what is untranslated.
        folder: Where the `.deb` files are put, or, without `download`, where they lie.
        min_chars: Characters of the shortest paragraph.
        max_chars: Characters of the longest one.
        download: Whether to fetch what is not there.

    Returns:
        Columns pair_id ("page#paragraph", the same in every language), language, text, source ("package version");
        sorted by language as given, then pair_id.

    Raises:
        UserError: no language or no such paragraph, a package that holds no help, and as `packages.fetch`.
    """
    folder, languages = Path(folder), list(dict.fromkeys(languages))
    if not languages:
        raise UserError(f"no language asked for: languages is empty; choose from {', '.join(LANGUAGES)}")
    packages = {language: f"libreoffice-help-{language}" for language in dict.fromkeys([REFERENCE, *languages])}
    debs = dict(zip(packages, debian.fetch(list(packages.values()), folder, download), strict=True))
    english = {
        key: text
        for key, text in sorted(_help_paragraphs(debs[REFERENCE]).items())
        if _is_prose(text, min_chars, max_chars)
    }
    first: dict[str, str] = {}  # English text -> the pair it names
    for key, text in english.items():
        first.setdefault(text, key)
    texts = {}
    for language in languages:
        if language != REFERENCE:
            shortest = round(min_chars * DENSE_SHARE) if language in DENSE else min_chars
            texts[language] = _translations(english, first, _help_paragraphs(debs[language]), shortest, max_chars)
    if REFERENCE in languages:
        paired = set().union(*texts.values()) if texts else set(first.values())
        texts[REFERENCE] = {key: text for text, key in first.items() if key in paired}

    about = debian.provenance(debs.values())
    rows = []
    for language in languages:
        source = f"{packages[language]} {about[packages[language]]['version']}"
        found = sorted(texts[language].items())
        rows += [{"pair_id": key, "language": language, "text": text, "source": source} for key, text in found]
    if not rows:
        raise UserError(
            f"the help packages hold no paragraph of {min_chars} to {max_chars} characters in {', '.join(languages)}; "
            "widen min_chars and max_chars"
        )
    kept = {"min_chars": min_chars, "max_chars": max_chars}
    return paragraphs(rows, {"source": "libreoffice-help", "licence": "MPL-2.0", **kept, "packages": about})


def _translations(
    english: dict[str, str], first: dict[str, str], other: dict[str, str], shortest: int, longest: int
) -> dict[str, str]:
    """{pair_id: text}: for each English text the first fitting translation that no other pair has."""
    found: dict[str, str] = {}
    seen = set()
    for key, source in english.items():
        text, pair = other.get(key, ""), first[source]
        if (
            pair not in found
            and text not in seen
            and _is_prose(text, shortest, longest)
            and not _is_untranslated(source, text)
        ):
            found[pair] = text
            seen.add(text)
    return found
