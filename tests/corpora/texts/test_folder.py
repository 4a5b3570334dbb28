"""Files of a reader's own as text."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from influence_kit.corpora.texts.folder import local_text, not_read
from influence_kit.corpora.texts.paragraphs import describe, load_text, save_text
from influence_kit.corpora.texts.sources import read_text
from influence_kit.errors import UserError


def test_own_text(tmp_path):
    own = tmp_path / "own"
    (own / "deep").mkdir(parents=True)
    (own / "b.txt").write_text("First line\nof a block.\n \n\n\nSecond block.\n\n", encoding="utf-8")
    rows = [{"text": "등불", "pair_id": "p1", "language": "ko"}, {"text": "lantern\u2028still one"}, {"text": "  "}]
    (own / "deep" / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    pq.write_table(
        pa.table({"text": ["Lampe"], "pair_id": ["p1"], "language": ["de"], "other": [1]}), own / "c.parquet"
    )
    (own / "notes.md").write_text("not read")
    table = read_text("folder", [], own)
    manifest = describe(table)
    assert table.to_pylist() == [
        {"pair_id": "b.txt#0", "language": "und", "text": "First line\nof a block.", "source": "b.txt"},
        {"pair_id": "b.txt#1", "language": "und", "text": "Second block.", "source": "b.txt"},
        {"pair_id": "p1", "language": "de", "text": "Lampe", "source": "c.parquet"},
        {"pair_id": "p1", "language": "ko", "text": "등불", "source": "deep/a.jsonl"},
        {"pair_id": "deep/a.jsonl#1", "language": "und", "text": "lantern\u2028still one", "source": "deep/a.jsonl"},
    ]
    assert manifest["pairs"] == {"de": 1, "ko": 1} and manifest["paragraphs"] == {"und": 3, "de": 1, "ko": 1}
    assert set(manifest["files"]) == {"b.txt", "c.parquet", "deep/a.jsonl"}
    assert local_text(own / "b.txt")["pair_id"].to_pylist() == ["b.txt#0", "b.txt#1"]
    save_text(table, tmp_path / "kept")
    assert load_text(tmp_path / "kept").equals(table)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "only blank paragraphs"),
        ("a.txt", b"caf\xe9", "cannot read .*a.txt: .*utf-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "cannot read .*: line 2 is not a JSON object"),
        ("a.jsonl", b"[1, 2]", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', "record 2: 'text' is None"),
        ("a.jsonl", b'{"text": 7}', "record 1: 'text' is 7"),
        ("a.parquet", b"PAR1 no", "cannot read .*a.parquet"),
        ("a.md", b"x", "found no .txt, .jsonl or .parquet"),
    ],
)
def test_own_text_that_cannot_be_used_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=message) as error:
            local_text(path)
        assert "\n" not in str(error.value)


def test_own_parquet_without_text_and_a_missing_folder(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'text' among body"):
        local_text(tmp_path)
    with pytest.raises(UserError, match="no text at"):
        local_text(tmp_path / "absent")


def test_what_a_folder_holds_that_is_not_read_is_named(tmp_path):
    for name in ("a.txt", "notes.md", "sub/data.csv", ".git/config", "B.TXT"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("Words.")
    assert not_read(tmp_path) == ["B.TXT", "notes.md", "sub/data.csv"]
    assert not_read(tmp_path / "a.txt") == []
    assert len(local_text(tmp_path)) == 1
    with pytest.raises(UserError, match="data.csv: found no .txt, .jsonl or .parquet file"):
        local_text(tmp_path / "sub" / "data.csv")
