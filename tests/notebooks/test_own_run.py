"""A model, texts and questions of one's own through the command line: it ends in what was found, and nothing tracked is touched."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.findings.test_asking import saved

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_a_run_of_ones_own_ends_in_what_it_found_and_touches_nothing_tracked(kind, tmp_path):
    def tracked() -> str:
        return subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout

    before, model = tracked(), saved(tmp_path, kind, context=1024)
    (tmp_path / "asked.yaml").write_text("- {prompt: The harbour lies, completion: ' north.'}\n" * 2)
    (tmp_path / "texts" / "table.csv").write_text("text\nnot read\n")
    own = [f"model={model}", f"texts={tmp_path / 'texts'}", f"queries={tmp_path / 'asked.yaml'}"]
    words = ["run", "--profile", "smoke", "--only", "12", *(word for each in own for word in ("-p", each))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "INFLUENCE_KIT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "influence_kit", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, found, place = done.stdout.splitlines()
    executed = Path(place.partition("the cards are in ")[2])
    assert found.startswith("12_a_real_language_model: ") and len(found.split()) > 8
    assert executed.is_file() and executed.parents[2] == ROOT / "figures" / "runs" and tracked() == before
    assert "Not read, being no .txt, .jsonl or .parquet: `table.csv`." in executed.read_text()
    kept = {path.name for path in (tmp_path / "cache").iterdir()}
    assert "model" not in kept and "text" not in kept  # nothing was trained or downloaded
    shutil.rmtree(executed.parents[1])
