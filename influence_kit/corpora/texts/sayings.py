"""Short English texts that two Debian packages hold: sayings and anecdotes of `fortunes`, entries of the hackers' dictionary
`jargon-text`. Fetched, never shipped.

A file of fortunes is plain text with a line "%" between two of them. The dictionary is one text: an entry begins with its head word
in colons, ":hack: 1. n.", and its paragraphs stand between empty lines. Licences: as in the packages; the dictionary is in the public
domain.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from influence_kit import packages as debian
from influence_kit.corpora.texts.paragraphs import paragraphs
from influence_kit.errors import UserError

PACKAGES = ("fortunes", "jargon-text")
# Of its files those that are prose of some length.
FILES = ("art", "computers", "education", "law", "science", "startrek", "tao", "wisdom", "work")
OVERSTRUCK = re.compile(".\b")  # a letter struck twice: the first goes
ENTRY = re.compile(r"\n {3}:(?P<head>[^\n]{1,60}?):[ \n](?P<body>.*?)(?=\n {3}:[^\n]{1,60}?:[ \n]|\Z)", re.DOTALL)
SPACE = re.compile(r"\s+")
# Drawings, tables and lists are no prose.
LEAST_LETTERS = 0.7


def sayings(folder: Path, least: int = 80, most: int = 400) -> pa.Table:
    """Sayings and entries of `least` to `most` characters, each text once, in the order of files and of texts within them.

    Args:
        folder: Where the `.deb` files are put; those that lie there are used as they are.
        least, most: Characters of a text, white space counted once.

    Returns:
        Columns pair_id (unique), language ("en"), text, source ("sayings" or "jargon").

    Raises:
        UserError: No such text, and as `packages.fetch`.
    """
    debs = debian.fetch(list(PACKAGES), folder)
    texts: dict[str, tuple[str, str]] = {}
    for deb, source, read in zip(debs, ("sayings", "jargon"), (_fortunes, _entries), strict=True):
        for name, text in read(deb):
            plain = SPACE.sub(" ", OVERSTRUCK.sub("", text)).strip()
            letters = sum(c.isalpha() for c in plain)
            if least <= len(plain) <= most and letters >= LEAST_LETTERS * len(plain):
                texts.setdefault(plain, (name, source))
    if not texts:
        raise UserError(f"{' and '.join(PACKAGES)} hold no text of {least} to {most} characters: widen least and most")
    rows = [
        {"pair_id": f"{name}#{place}", "language": "en", "text": text, "source": source}
        for place, (text, (name, source)) in enumerate(texts.items())
    ]
    origin = {"source": " and ".join(PACKAGES), "licence": "as in the packages", "packages": debian.provenance(debs)}
    return paragraphs(rows, origin)


def _fortunes(deb: Path) -> Iterator[tuple[str, str]]:
    for path, content in sorted(debian.members(deb, tuple(f"/fortunes/{name}" for name in FILES))):
        name = path.rpartition("/")[2]
        yield from ((name, text) for text in content.decode("utf-8", "replace").split("\n%\n"))


def _entries(deb: Path) -> Iterator[tuple[str, str]]:
    for _, content in debian.members(deb, "jargon.txt.gz"):
        text = gzip.decompress(content).decode("utf-8", "replace")
        for found in ENTRY.finditer(text):
            yield from ((found["head"], part) for part in f"{found['head']}: {found['body']}".split("\n\n"))
