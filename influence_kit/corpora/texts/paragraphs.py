"""Text as every source gives it, a row a paragraph, with where it came from; and how it is kept.

Rows that share a `pair_id` are translations of each other.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from influence_kit.files import whole, write_whole

SCHEMA = pa.schema([(name, pa.string()) for name in ("pair_id", "language", "text", "source")])


def paragraphs(rows: list[dict], origin: dict, schema: pa.Schema = SCHEMA) -> pa.Table:
    """Rows as a table that carries where they came from: source, licence, packages or files."""
    return pa.Table.from_pylist(rows, schema=schema.with_metadata({"origin": json.dumps(origin)}))


def describe(table: pa.Table) -> dict:
    """Where a text came from, how much of it there is in each language, and a hash of it.

    `text_sha256` covers pair_id, language and text of every row in order; `pairs` counts, by language, the paragraphs
    whose pair has a text in another language too.
    """
    columns = [table[name].to_pylist() for name in ("pair_id", "language", "text")]
    sharing = Counter(columns[0])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in zip(*columns, strict=True))
    origin = json.loads((table.schema.metadata or {}).get(b"origin", b"{}"))
    return origin | {
        "paragraphs": dict(Counter(columns[1])),
        "pairs": dict(Counter(language for pair, language in zip(*columns[:2], strict=True) if sharing[pair] > 1)),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def save_text(table: pa.Table, folder: Path) -> None:
    """Write text.parquet, and manifest.json with what `describe` says, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "text.parquet") as part:
        pq.write_table(table, part, compression="zstd")
    manifest = json.dumps(describe(table), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    write_whole(folder / "manifest.json", manifest)


def load_text(folder: Path) -> pa.Table:
    """The table that `save_text` wrote."""
    return pq.read_table(folder / "text.parquet")
