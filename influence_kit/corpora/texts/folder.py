"""A reader's own text: files of theirs, as they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from influence_kit.corpora.texts.paragraphs import paragraphs
from influence_kit.errors import UserError, first_line
from influence_kit.files import sha256

UNKNOWN_LANGUAGE = "und"


def local_text(path: Path) -> pa.Table:
    """Paragraphs of `.txt`, `.jsonl` and `.parquet` files in UTF-8; blank ones are left out, nothing else is changed.

    `.txt`: a paragraph per block between blank lines. `.jsonl`: one object per line with `text`, optionally `pair_id`
    and `language`. `.parquet`: the same columns. Missing `pair_id`: "file#number"; missing `language`: "und".

    Args:
        path: A file, or a folder that is searched through.

    Returns:
        Columns pair_id, language, text, source (the file's path in the folder).

    Raises:
        UserError: nothing there, an unreadable file, a missing or wrong `text`.
    """
    path = Path(path)
    below = (file for file in path.rglob("*") if file.suffix in _READERS and file.is_file())
    files = [path] if path.is_file() else sorted(below)
    if not files or files[0].suffix not in _READERS:
        raise UserError(
            f"no text at {path}: found no .txt, .jsonl or .parquet file; give such a file or a folder of them"
        )
    rows, hashes = [], {}
    for file in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        try:
            records = _READERS[file.suffix](file)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"cannot read {file}: {first_line(error)}; mend the file or take it out") from error
        hashes[name] = sha256(file)
        for number, record in enumerate(records):
            if not isinstance(record.get("text"), str):
                raise UserError(
                    f"{file}, record {number + 1}: 'text' is {record.get('text')!r}; give each record a "
                    "string named 'text'"
                )
            if not all(_is_text(value) for value in record.values()):
                raise UserError(
                    f"{file}, record {number + 1}: half of a surrogate pair is no text; mend or take it out"
                )
            if record["text"].strip():
                rows.append(
                    {
                        "pair_id": str(record.get("pair_id") or f"{name}#{number}"),
                        "text": record["text"],
                        "language": str(record.get("language") or UNKNOWN_LANGUAGE),
                        "source": name,
                    }
                )
    if not rows:
        raise UserError(f"no text at {path}: its {len(files)} file(s) hold only blank paragraphs; give files with text")
    return paragraphs(rows, {"source": "folder", "licence": "the user's own", "files": hashes})


def not_read(path: Path) -> list[str]:
    """Files of a folder that `local_text` passes over, by their path in it; hidden ones and what lies in hidden folders are not named."""
    if not path.is_dir():
        return []
    below = (file.relative_to(path) for file in path.rglob("*") if file.suffix not in _READERS and file.is_file())
    return sorted(file.as_posix() for file in below if not any(part.startswith(".") for part in file.parts))


def _text(file: Path) -> str:
    """A file's text, without the byte-order mark that some editors begin with."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is no utf-8 (save the file as UTF-8)") from error


def _is_text(value: object) -> bool:
    """Whether UTF-8 can hold a value of a record: JSON may escape half of a surrogate pair, which is no character."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_txt(file: Path) -> list[dict]:
    blocks = re.split(r"\n[^\S\n]*\n", _text(file))
    return [{"text": block.strip()} for block in blocks if block.strip()]


def _read_jsonl(file: Path) -> list[dict]:
    records = []
    for number, line in enumerate(_text(file).split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is not a JSON object") from error
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is not a JSON object")
            records.append(record)
    return records


def _read_parquet(file: Path) -> list[dict]:
    names = pq.read_schema(file).names
    if "text" not in names:
        raise ValueError(f"no column 'text' among {', '.join(names)}")
    return pq.read_table(file, columns=[name for name in ("pair_id", "language", "text") if name in names]).to_pylist()


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
