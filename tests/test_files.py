"""Files: whole or not at all."""

import hashlib
from pathlib import Path

import pytest

from influence_kit.files import free_disk, sha256, whole, write_whole


def test_a_file_is_replaced_as_a_whole_or_stays_as_it_was(tmp_path: Path):
    path = tmp_path / "note.txt"
    write_whole(path, "first, 등")
    assert path.read_text(encoding="utf-8") == "first, 등"
    with pytest.raises(RuntimeError), whole(path) as part:
        part.write_text("half of the sec")
        raise RuntimeError("killed")
    assert path.read_text(encoding="utf-8") == "first, 등" and [each.name for each in tmp_path.iterdir()] == [
        "note.txt"
    ]
    with whole(path) as part:
        part.write_bytes(b"second")
        assert path.read_text(encoding="utf-8") == "first, 등"
    assert path.read_bytes() == b"second"


def test_hash_and_room(tmp_path: Path):
    write_whole(tmp_path / "bytes", b"\0\1")
    assert sha256(tmp_path / "bytes") == hashlib.sha256(b"\0\1").hexdigest()
    assert free_disk(tmp_path / "not" / "there") == free_disk(tmp_path) > 0
