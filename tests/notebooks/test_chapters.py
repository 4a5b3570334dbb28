"""Every chapter, executed on the smoke profile from beginning to end, and read as a newcomer would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas
import pytest

from influence_kit.findings.discovery import chapter_names
from influence_kit.findings.fixed import fixed_claims
from influence_kit.measures.claims import STATUSES
from influence_kit.packages import available
from tests.publishing.test_tables import wrong_tables

NEEDS_TEXT = ("12_a_real_language_model",)  # wholly
CHAPTERS = [name for name in chapter_names() if not (available() and name in NEEDS_TEXT)]

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "figures" / ("runs/smoke-no-real_text" if available() else "smoke")  # what is left out is a change
pytestmark = pytest.mark.slow


def run(*options: str) -> subprocess.CompletedProcess:
    without = ["--without-real-text"] if available() else []
    command = [sys.executable, "-m", "influence_kit", "run", "--profile", "smoke", *without, *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def first():
    done = run()
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def verdicts(first):
    return json.loads((FIGURES / "verdicts.json").read_text())


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_runs_and_shows_its_verdict_figures_and_sequences(first, verdicts, chapter):
    notebook = nbformat.read(FIGURES / "notebooks" / f"{chapter}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type in ("error", "stream")]  # no noise either
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    assert all(output.metadata["image/png"]["alt"] for output in pictures)
    html = "".join(output.get("data", {}).get("text/html", "") for output in outputs)
    assert "<span" in html or (
        chapter == "01_worlds_and_models" and "<table" in html
    )  # a token card, or documents in a table
    rules = {id for id, rule in fixed_claims().items() if rule.chapter == chapter}
    concluded = {claim["id"] for claim in verdicts["claims"] if claim["chapter"] == chapter}
    assert concluded == rules or (available() and concluded < rules)  # without real text some cannot be asked


def test_verdicts_have_their_promised_form(verdicts):
    assert len({claim["id"] for claim in verdicts["claims"]}) == len(verdicts["claims"]) >= 18
    parts = (
        "id chapter claim tier paper measured interval unit seeds per_seed threshold delta status holm referee sentence"
    )
    for claim in verdicts["claims"]:
        assert set(parts.split()) <= set(claim) and claim["chapter"] in CHAPTERS and len(claim["interval"]) == 2
        assert claim["status"] in STATUSES[claim["tier"]] and set(claim["per_seed"]) == set(map(str, claim["seeds"]))
        if claim["tier"] == "primary":  # one seed decides nothing
            assert claim["status"] == "undecided" and claim["delta"] > 0
    assert verdicts["figures"] and all(set(figure) >= {"name", "status"} for figure in verdicts["figures"])


def test_every_figure_has_its_four_files_with_provenance(verdicts):
    import pyarrow.parquet

    for figure in verdicts["figures"]:
        assert figure["status"] != "new", f"{figure['name']} is not in expected.json: run smoke with --update-expected"
        files = {kind: FIGURES / f"{figure['name']}.{kind}" for kind in ("png", "svg", "parquet", "csv")}
        assert all(path.stat().st_size > 20 for path in files.values())
        about = json.loads(pyarrow.parquet.read_schema(files["parquet"]).metadata[b"influence_kit"])
        assert about["profile"] == "smoke" and about["seeds"] == [11] and about["stages"]
        assert len(pandas.read_csv(files["csv"])) == len(pandas.read_parquet(files["parquet"]))
        assert "<desc>" in files["svg"].read_text()


def test_estimates_follow_from_their_seeds(first):
    assert wrong_tables(FIGURES) == {}


def test_second_run_makes_nothing_and_changes_no_byte(first):
    before = {path.name: path.read_bytes() for path in FIGURES.glob("*.*") if path.name != "provenance.json"}
    again = run()
    assert again.returncode == 0, again.stderr[-3000:]
    assert "0 made" in again.stderr + again.stdout
    assert before == {path.name: path.read_bytes() for path in FIGURES.glob("*.*") if path.name != "provenance.json"}


def test_a_chapter_runs_alone_in_papermill_with_another_parameter(first, tmp_path):
    """What a reader does: papermill on one notebook, one knob changed; the models come from the cache."""
    import papermill

    os.environ["INFLUENCE_KIT_FIGURES"] = str(tmp_path)
    try:
        parameters = {"profile": "smoke", "top": 0.05, "real_text": False}
        source = ROOT / "notebooks" / "04_abstraction_vs_size.ipynb"
        papermill.execute_notebook(
            str(source),
            str(tmp_path / "out.ipynb"),
            parameters,
            kernel_name="python3",
            cwd=str(ROOT),
            progress_bar=False,
        )
    finally:
        del os.environ["INFLUENCE_KIT_FIGURES"]
    ours = pandas.read_parquet(tmp_path / "04_meaning_by_size.parquet")
    theirs = pandas.read_parquet(FIGURES / "04_meaning_by_size.parquet")
    assert len(ours) == len(theirs) and not ours.equals(theirs)
