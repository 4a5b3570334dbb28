"""Real text: aligned paragraphs of LibreOffice's help in many languages, and a user's own text; fetched, never shipped.

Every source gives the same table, one row per paragraph: `pair_id`, `language`, `text`, `source`. Rows that share a
`pair_id` are translations of each other.
"""

import hashlib
import json
import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from influence_kit import packages as debian
from influence_kit.errors import UserError

SCHEMA = pa.schema([(name, pa.string()) for name in ("pair_id", "language", "text", "source")])
LANGUAGES = ("en-us", "de", "ko", "tr", "zh-cn")
REFERENCE = "en-us"
# One Han or Hangul character carries about what two to three Latin letters do.
DENSE = {"ja", "ko", "zh-cn", "zh-tw"}
DENSE_SHARE = 0.375
UNKNOWN_LANGUAGE = "und"
SOURCES = ("libreoffice", "debs", "folder", "hub")

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


def libreoffice_help(languages: Sequence[str], folder: Path, min_chars: int = 40, max_chars: int = 300,
                     download: bool = True) -> pa.Table:
    """Aligned paragraphs of LibreOffice's help (Debian packages `libreoffice-help-<language>`, licence MPL-2.0).

    `languages` are package suffixes ("en-us", "de", "ko", "tr", "zh-cn", ...). `folder` is where the `.deb` files are
    put, or, with `download=False`, where they lie. English is always read, since it tells what is untranslated.

    Kept are paragraphs of `min_chars` to `max_chars` characters in English and in the language (Chinese, Japanese,
    Korean: from 3/8 of `min_chars`), that are prose and translated. No text stands twice within a language: where one
    English text stands in several places, the first names the pair. English rows are those with at least one
    translation among `languages` (all when English alone is asked for).

    Returns columns pair_id ("page#paragraph", the same in every language), language, text, source ("package version");
    sorted by language as given, then pair_id. `describe` tells packages, versions and counts.
    Raises UserError: see `debian.fetch`; packages missing in `folder` with `download=False`; not a help package.
    """
    folder, languages = Path(folder), list(dict.fromkeys(languages))
    if not languages:
        raise UserError(f"no language asked for: languages is empty; choose from {', '.join(LANGUAGES)}")
    packages = {language: f"libreoffice-help-{language}" for language in dict.fromkeys([REFERENCE, *languages])}
    if download:
        debs = dict(zip(packages, debian.fetch(list(packages.values()), folder), strict=True))
    else:
        lying = {language: debian.find(package, folder) for language, package in packages.items()}
        debs = {language: deb for language, deb in lying.items() if deb is not None}
        missing = [f"{package}_*.deb" for language, package in packages.items() if language not in debs]
        if missing:
            raise UserError(f"the folder {folder} lacks {', '.join(missing)}; put the files there, leave their "
                            "languages out, or run with --without-real-text")

    english = {key: text for key, text in sorted(_help_paragraphs(debs[REFERENCE]).items())
               if _is_prose(text, min_chars, max_chars)}
    first: dict[str, str] = {}  # English text -> the pair it names
    for key, text in english.items():
        first.setdefault(text, key)
    texts = {language: _translations(english, first, _help_paragraphs(debs[language]), max_chars,
                                     round(min_chars * DENSE_SHARE) if language in DENSE else min_chars)
             for language in languages if language != REFERENCE}
    if REFERENCE in languages:
        paired = set().union(*texts.values()) if texts else set(first.values())
        texts[REFERENCE] = {key: text for text, key in first.items() if key in paired}

    versions = {language: debian.version(deb) for language, deb in debs.items()}
    rows = [{"pair_id": key, "language": language, "text": texts[language][key],
             "source": f"{packages[language]} {versions[language]}"}
            for language in languages for key in sorted(texts[language])]
    if not rows:
        raise UserError(f"the help packages hold no paragraph of {min_chars} to {max_chars} characters in "
                        f"{', '.join(languages)}; widen min_chars and max_chars")
    origin = {"source": "libreoffice-help", "licence": "MPL-2.0", "min_chars": min_chars, "max_chars": max_chars,
              "packages": {packages[language]: {"version": versions[language], "sha256": _sha256(deb.read_bytes())}
                           for language, deb in debs.items()}}
    return _table(rows, origin)


def _translations(english: dict[str, str], first: dict[str, str], other: dict[str, str], longest: int,
                  shortest: int) -> dict[str, str]:
    """{pair_id: text}: for each English text the first fitting translation that no other pair has."""
    found: dict[str, str] = {}
    seen = set()
    for key, source in english.items():
        text, pair = other.get(key, ""), first[source]
        if (pair not in found and text not in seen and _is_prose(text, shortest, longest)
                and not _is_untranslated(source, text)):
            found[pair] = text
            seen.add(text)
    return found


def local_text(path: Path) -> pa.Table:
    """A user's own text: a file or a folder (searched through) of `.txt`, `.jsonl` and `.parquet` files.

    `.txt`: a paragraph per block between blank lines. `.jsonl`: one object per line with `text`, optionally `pair_id`
    and `language`. `.parquet`: the same columns. Files are UTF-8. Missing `pair_id`: "file#number"; missing `language`:
    "und". Paragraphs that are blank are left out; nothing else is changed. `source` is the file's path in the folder.
    Raises UserError: nothing there, unreadable file, missing or wrong `text`.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in _READERS)
    if not files or files[0].suffix not in _READERS:
        raise UserError(f"no text at {path}: found no .txt, .jsonl or .parquet file; give such a file or a folder of "
                        "them")
    rows, hashes = [], {}
    for file in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        try:
            records = _READERS[file.suffix](file)
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot read {file}: {reason}; mend the file or take it out") from error
        hashes[name] = _sha256(file.read_bytes())
        for number, record in enumerate(records):
            if not isinstance(record.get("text"), str):
                raise UserError(f"{file}, record {number + 1}: 'text' is {record.get('text')!r}; give each record a "
                                "string named 'text'")
            if record["text"].strip():
                rows.append({"pair_id": str(record.get("pair_id") or f"{name}#{number}"), "text": record["text"],
                             "language": str(record.get("language") or UNKNOWN_LANGUAGE), "source": name})
    if not rows:
        raise UserError(f"no text at {path}: its {len(files)} file(s) hold only blank paragraphs; give files with text")
    return _table(rows, {"source": "folder", "licence": "the user's own", "files": hashes})


def _read_txt(file: Path) -> list[dict]:
    blocks = re.split(r"\n[^\S\n]*\n", file.read_text(encoding="utf-8"))
    return [{"text": block.strip()} for block in blocks if block.strip()]


def _read_jsonl(file: Path) -> list[dict]:
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                records.append(dict(json.loads(line)))
            except (TypeError, ValueError) as error:
                raise ValueError(f"line {number} is not a JSON object") from error
    return records


def _read_parquet(file: Path) -> list[dict]:
    names = pq.read_schema(file).names
    if "text" not in names:
        raise ValueError(f"no column 'text' among {', '.join(names)}")
    return pq.read_table(file, columns=[name for name in ("pair_id", "language", "text") if name in names]).to_pylist()


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def hub_text(name: str, split: str = "train", column: str = "text", limit: int = 10_000,
             configuration: str | None = None) -> pa.Table:
    """The first `limit` non-blank texts of a Hugging Face data set, streamed; no code of the data set is ever run.

    Raises UserError: hub not reachable, no such data set, split, configuration or column, or no text.
    """
    import datasets

    given = f"data set {name!r} (configuration {configuration!r}, split {split!r})"
    rows = []
    try:
        for number, record in enumerate(datasets.load_dataset(name, configuration, split=split, streaming=True)):
            if not isinstance(record.get(column), str):
                raise UserError(f"{given} has no text column {column!r}; it has {', '.join(record)}: choose one")
            if record[column].strip():
                rows.append({"pair_id": f"{name}/{split}#{number}", "language": UNKNOWN_LANGUAGE,
                             "text": record[column], "source": name})
            if len(rows) >= limit:
                break
    except ConnectionError as error:
        raise UserError(f"cannot load {given}: the hub does not answer ({_one_line(error)}); connect to a network, or "
                        "use text source 'folder' with files of your own, or run with --without-real-text") from error
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds: unknown names, gated sets, scripts, broken files
        raise UserError(f"cannot load {given}: {type(error).__name__}: {_one_line(error)}; check the names on the "
                        "data set's page") from error
    if not rows:
        raise UserError(f"{given} holds no text in column {column!r}; choose another split or column")
    return _table(rows, {"source": "hub", "licence": "see the data set's page", "name": name, "split": split,
                         "configuration": configuration, "column": column, "limit": limit})


def read_text(source: str, languages: Sequence[str], location: str | Path, **options) -> tuple[pa.Table, dict]:
    """(table, manifest) from one of `SOURCES`: "libreoffice" (downloaded into the folder `location`), "debs" (`.deb`
    files in that folder), "folder" (a user's files at that path), "hub" (a data set of that name).

    `languages` is for the help alone; `options` are those of `libreoffice_help`, `hub_text`.
    Raises UserError for an unknown source, and what `libreoffice_help`, `local_text` and `hub_text` raise.
    """
    if source in ("libreoffice", "debs"):
        table = libreoffice_help(languages, Path(location), download=source == "libreoffice", **options)
    elif source == "folder":
        table = local_text(Path(location))
    elif source == "hub":
        table = hub_text(str(location), **options)
    else:
        raise UserError(f"unknown text source {source!r}; choose one of {', '.join(SOURCES)}")
    return table, describe(table)


def describe(table: pa.Table) -> dict:
    """The manifest of a table from this module: where it came from, hashes, licence, counts per language.

    `text_sha256` covers pair_id, language and text of every row in order; `pairs` counts, per language, the paragraphs
    whose pair has a text in another language too.
    """
    columns = [table[name].to_pylist() for name in ("pair_id", "language", "text")]
    sharing = Counter(columns[0])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in zip(*columns, strict=True))
    origin = json.loads((table.schema.metadata or {}).get(b"origin", b"{}"))
    return origin | {
        "paragraphs": dict(Counter(columns[1])),
        "pairs": dict(Counter(language for pair, language in zip(*columns[:2], strict=True) if sharing[pair] > 1)),
        "text_sha256": _sha256(text.encode()),
    }


def cache_text(table: pa.Table, manifest: dict, folder: Path) -> None:
    """Write `text.parquet` and `manifest.json` into `folder`, each whole or not at all.

    Warns when the folder holds a text of other package versions, or another text of the same versions.
    Raises UserError when the folder cannot be written or the disk is full.
    """
    folder = Path(folder)
    _warn_of_change(folder / "manifest.json", manifest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "text.parquet", lambda part: pq.write_table(table, part, compression="zstd"))
        content = json.dumps(manifest, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        _write(folder / "manifest.json", lambda part: part.write_text(content, encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot write text to {folder}: {_one_line(error)}; set INFLUENCE_KIT_CACHE to a folder with "
                        "space that you may write to") from error


def _warn_of_change(path: Path, manifest: dict) -> None:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # nothing cached, or a damaged manifest that is replaced now
    old, new = ({name: package["version"] for name, package in data.get("packages", {}).items()}
                for data in (before, manifest))
    both = sorted(old.keys() & new.keys())
    changed = [f"{name} {old[name]} -> {new[name]}" for name in both if old[name] != new[name]]
    if changed:
        warnings.warn(f"the text cached in {path.parent} came from other package versions: {', '.join(changed)}; "
                      "numbers made with the one do not compare with numbers made with the other", stacklevel=3)
    elif old == new and before.get("text_sha256") != manifest.get("text_sha256"):
        warnings.warn(f"the text in {path.parent} changed: sha256 {before.get('text_sha256')} -> "
                      f"{manifest.get('text_sha256')}", stacklevel=3)


def load_text(folder: Path) -> tuple[pa.Table, dict]:
    """(table, manifest) that `cache_text` wrote. Raises UserError when one is missing or the text is not what it was."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        table = pq.read_table(folder / "text.parquet")
    except FileNotFoundError as error:
        raise UserError(f"no cached text in {folder}: {Path(error.filename or folder).name} is missing; fetch the text "
                        "again") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"the cached text in {folder} is damaged ({_one_line(error)}); remove the folder and fetch the "
                        "text again") from error
    recorded, found = manifest.get("text_sha256"), describe(table)["text_sha256"]
    if recorded != found:
        raise UserError(f"the cached text in {folder} is damaged (sha256 {found}, recorded {recorded}); remove the "
                        "folder and fetch the text again")
    return table, manifest


def _table(rows: list[dict], origin: dict) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata({"origin": json.dumps(origin)}))


def _write(path: Path, writer) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        writer(part)
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
