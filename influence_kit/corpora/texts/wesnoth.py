"""Spoken lines of Battle for Wesnoth's campaigns: packages `wesnoth-<series>-<campaign>`, fetched, never shipped.

Campaigns are written in WML, nested tags with attributes:

    [message]
        speaker=Delfador
        message= _ "We must leave this place at once!"
    [/message]

Read are messages whose speaker is named; what macros with arguments would say is not. Licence of the text: GPL-2+.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from influence_kit import packages as debian
from influence_kit.corpora.texts.paragraphs import paragraphs
from influence_kit.errors import UserError

SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("pair_id", "language", "text", "campaign", "scenario", "speaker", "side")]
    + [("order", pa.int32())]
)
SOURCES = ("wesnoth", "debs")
NARRATOR = "narrator"
# What WML calls a speaker without saying who it is.
NOBODY = {"", "unit", "second_unit", "student_unit"}
SERIES = re.compile(r"\bwesnoth-(\d+\.\d+)")
SCENARIO = re.compile(r".*/data/campaigns/[^/]+/scenarios/(?:.*/)?([^/]+)\.cfg")
DEFINITION = re.compile(r"^[ \t]*#define[ \t]+(\w+)[ \t]*\n(.*?)^[ \t]*#enddef", re.MULTILINE | re.DOTALL)
JOINED = re.compile(r'(?<!")"\s*\+\s*_?\s*"(?!")')  # "one " + _ "and two"
WML = re.compile(
    r"""\[(?P<end>/?)\+?(?P<tag>\w+)\]
    | (?P<key>\w+)[ \t]*=[ \t]*(?P<value>_?[ \t]*"(?:[^"]|"")*"|[^\n"\[#]*)
    | "(?:[^"]|"")*" | \#[^\n]* | \w+ | \s+ | .""",
    re.VERBOSE | re.DOTALL,
)
QUOTED = re.compile(r'\s*_?\s*"(.*)"\s*', re.DOTALL)
MARKUP = re.compile(r"<[^<>]*>")


def campaign_lines(campaigns: Sequence[str], folder: Path, download: bool = True) -> pa.Table:
    """All named speakers' lines of these campaigns, in the order of scenario files and of lines within them.

    Which series is packaged (1.16, 1.18, ...) differs between systems: the newest at hand is taken. No speaker says the
    same text twice in a campaign.

    Args:
        campaigns: Package suffixes ("httt", "utbs", ...).
        folder: Where the `.deb` files are put, or, without `download`, where they lie.
        download: Whether to fetch what is not there.

    Returns:
        Columns pair_id (unique), language ("en"), text, campaign, scenario (its file), speaker (WML's id), side (of the
        speaker in most scenarios that say so, as a number; "" where none does), order (within the campaign).

    Raises:
        UserError: no campaign, a package without scenarios, and as `packages.fetch`.
    """
    folder, campaigns = Path(folder), list(dict.fromkeys(campaigns))
    if not campaigns:
        raise UserError("no campaign asked for: campaigns is empty; give package suffixes such as httt, utbs")
    series = _packaged_series(folder) if download else _lying_series(folder)
    debs = debian.fetch([f"wesnoth-{series}-{campaign}" for campaign in campaigns], folder, download)
    rows = [row for campaign, deb in zip(campaigns, debs) for row in _lines(campaign, deb)]
    origin = {"source": "wesnoth campaigns", "licence": "GPL-2+", "packages": debian.provenance(debs)}
    return paragraphs(rows, origin, SCHEMA)


def _packaged_series(folder: Path) -> str:
    """The series that this system packages, told by what the metapackage `wesnoth` depends on."""
    deb = debian.fetch(["wesnoth"], folder)[0]
    found = SERIES.search(debian.control(deb).get("Depends", ""))
    if found is None:
        raise UserError(
            f"{deb.name} does not say which series of wesnoth it stands for; put wesnoth-<series>-<campaign>_*.deb "
            "files into a folder and set the source to 'debs'"
        )
    return found[1]


def _lying_series(folder: Path) -> str:
    found = {match[1] for path in folder.glob("wesnoth-*.deb") if (match := SERIES.match(path.name))}
    if not found:
        raise UserError(
            f"the folder {folder} holds no wesnoth-<series>-<campaign>_*.deb; put the files there, or run with "
            "--without-real-text"
        )
    return max(found, key=lambda series: tuple(map(int, series.split("."))))


def _lines(campaign: str, deb: Path) -> list[dict]:
    sources = {name: content.decode("utf-8", errors="replace") for name, content in debian.members(deb, ".cfg")}
    macros = {name: body for text in sources.values() for name, body in DEFINITION.findall(text)}
    spoken: list[tuple[str, str, str]] = []
    sides: dict[str, Counter] = {}
    for name, text in sorted(sources.items()):
        scenario = SCENARIO.fullmatch(name)
        if scenario is None:
            continue
        for tag, attributes in nodes(expand(text, macros)):
            speaker = attributes.get("speaker", "")
            said = plain(attributes.get("message", ""))
            if tag == "message" and said and speaker not in NOBODY and speaker == plain(speaker):
                spoken.append((scenario[1], speaker, said))
            elif tag in ("side", "unit", "leader") and attributes.get("side", "").isdigit() and attributes.get("id"):
                sides.setdefault(attributes["id"], Counter())[attributes["side"]] += 1
    if not spoken:
        raise UserError(f"{deb} holds no spoken line (no data/campaigns/*/scenarios/*.cfg); give a campaign's package")
    first = {(speaker, said): (scenario, speaker, said) for scenario, speaker, said in reversed(spoken)}
    kept = [line for line in dict.fromkeys(spoken) if first[line[1:]] == line]
    return [
        {
            "pair_id": f"{campaign}/{scenario}#{order}:{speaker}",
            "language": "en",
            "text": said,
            "campaign": campaign,
            "scenario": scenario,
            "speaker": speaker,
            "side": sides[speaker].most_common(1)[0][0] if speaker in sides else "",
            "order": order,
        }
        for order, (scenario, speaker, said) in enumerate(kept)
    ]


def expand(text: str, macros: Mapping[str, str], depth: int = 3) -> str:
    """WML with `{NAME}` replaced by the macro's body, for macros without arguments; unknown ones stay."""
    for _ in range(depth):
        expanded = re.sub(r"\{(\w+)\}", lambda found: macros.get(found[1], found[0]), text)
        if expanded == text:
            break
        text = expanded
    return text


def nodes(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(tag, its own attributes) of each closed tag of WML, in the order of closing; strings joined and unquoted."""
    text = re.sub(r"<<.*?>>", "", text, flags=re.DOTALL)  # Lua
    text = re.sub(r"^[ \t]*#.*$", "", text, flags=re.MULTILINE)
    opened: list[tuple[str, dict[str, str]]] = []
    for token in WML.finditer(JOINED.sub("", text)):
        if token["tag"] and not token["end"]:
            opened.append((token["tag"], {}))
        elif token["tag"]:
            while opened:  # a tag that a macro closes is still open here
                node = opened.pop()
                if node[0] == token["tag"]:
                    yield node
                    break
        elif token["key"] and opened:
            opened[-1][1].setdefault(token["key"], _unquoted(token["value"]))


def _unquoted(value: str) -> str:
    quoted = QUOTED.fullmatch(value)
    return quoted[1].replace('""', '"') if quoted else value.strip()


def plain(text: str) -> str:
    """A line as it is read: without markup, on one line; "" where it holds a variable."""
    text = " ".join(html.unescape(MARKUP.sub(" ", text)).split())
    return "" if "$" in text or "{" in text else text
