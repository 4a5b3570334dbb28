import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas
import pytest

from influence_kit.errors import UserError
from influence_kit.measures.claims import Rule, judged, row_of, write_json
from influence_kit.measures.intervals import over_seeds
from influence_kit.publishing.notebooks import (
    KERNEL,
    answer,
    chapter_stage,
    chosen_parameters,
    normalise,
    read_cells,
    to_text,
)
from influence_kit.publishing.results import closing_screen, publish, read_claims
from influence_kit.publishing.runs import Run
from influence_kit.runner.scheduler import RunFailed
from influence_kit.runner.stages import record
from tests.runner.tiny_stages import run_stages, stage

REPOSITORY = Path(__file__).parents[2]
PARAMETERS = (
    "profile: str = 'laptop'  # the profile\nseeds: list = [0, 1, 2]\nscale = 2.0  # of the noise\ncount: int = 3\n"
    "sizes: list = [1]\nword: str = 'plain'"
)
CHAPTER = """
import json, os, sys
from pathlib import Path
import pandas
from tqdm import tqdm
figures = Path(os.environ["INFLUENCE_KIT_FIGURES"])
for _ in tqdm(range(3), file=sys.__stderr__):
    print("step", end=" ")
table = pandas.DataFrame({"size": range(count), "value": [scale * i for i in range(count)]})
table.to_parquet(figures / "growth.parquet")
table.to_csv(figures / "growth.csv", index=False)
size = (figures / "growth.png").write_bytes(b"a picture")
"""
SEEN = 'print(os.environ["INFLUENCE_KIT_FIGURES"], sys.prefix, object())'
CLAIMS = """
row = dict(id="grows", chapter="01_growth", claim="It grows", tier="primary", paper="2 per step", measured=scale,
           interval=[1.5, 2.5], unit="per step", seeds=seeds, per_seed={}, threshold=0, side="above", delta=0.1, status="confirmed")
(figures / "claims").mkdir()
with open(figures / "claims" / "01_growth.json", "w") as file:
    json.dump([row], file)
row["status"]
"""


def write_notebook(folder: Path, name: str, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source.strip()) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL})
    path = folder / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


def files(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "stage.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# --- executing


def test_a_chapter_is_executed_cached_normalised_and_published(tmp_path, monkeypatch, capfd):
    # A kernel of the same name that belongs to somebody else must not be taken.
    foreign = tmp_path / "jupyter" / "kernels" / "python3"
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    path = write_notebook(tmp_path, "01_growth", CHAPTER, SEEN, CLAIMS)
    below = stage("number", "seven", value=7)
    chapter = chapter_stage(path, {"profile": "smoke"}, {"name": "smoke"}, [below])
    assert [each.label for each in run_stages([chapter], jobs=1)] == ["seven", "01_growth"]
    first = files(chapter.folder)
    assert set(first) == {
        "growth.parquet", "growth.csv", "growth.png", "claims/01_growth.json", "notebooks/01_growth.ipynb",
    }  # fmt: skip
    assert run_stages([chapter], jobs=1) == []

    # Executed again, in another process at another time: not a byte differs.
    run_stages([chapter], jobs=1, force_kinds={"01_growth"})
    assert files(chapter.folder) == first
    assert not chapter.beside(".log").exists() and not chapter.beside(".failed.ipynb").exists()

    text = first["notebooks/01_growth.ipynb"].decode()
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert [cell.id for cell in notebook.cells] == [f"cell-{number:02d}" for number in range(5)]
    assert notebook.cells[1].metadata.tags == ["injected-parameters"] and "smoke" in notebook.cells[1].source
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert [output.text for output in notebook.cells[2].outputs] == ["step step step "]  # no progress bar
    place, environment, thing = notebook.cells[3].outputs[0].text.split(maxsplit=2)
    assert (place.split("/")[0], environment) == ("<cache>", "<environment>") and "at 0x…" in thing
    assert str(tmp_path) not in text and "/tmp" not in text

    figures = tmp_path / "figures" / "smoke"
    claims, judged = publish(figures, [chapter])
    assert {**first, "provenance.json": b"", "verdicts.json": b""}.keys() == files(figures).keys()
    assert judged == [{"name": "growth", "status": "new"}] and claims[0].id == "grows"
    written = json.loads((figures / "verdicts.json").read_text())
    assert written["claims"][0]["interval"] == [1.5, 2.5] and written["figures"] == judged
    provenance = json.loads((figures / "provenance.json").read_text())
    assert set(provenance) == {chapter.fingerprint, below.fingerprint}
    assert provenance[chapter.fingerprint]["stages"] == [below.fingerprint]
    assert {"commit", "host", "wall_seconds", "peak_memory_bytes", "versions"} <= set(provenance[below.fingerprint])
    screen = closing_screen(claims, judged, figures).splitlines()
    assert screen[0].split() == "01 It grows confirmed 2.0 [1.5, 2.5] – 2 per step".split()
    assert screen[1:3] == ["1 findings: 1 confirmed.", "figures: 1 new"] and "verdicts.json" in screen[3]

    _, judged = publish(figures, [chapter], update_expected=True)
    assert judged == [{"name": "growth", "status": "reproduced"}]
    other = chapter_stage(path, {"scale": 3.0}, {"name": "smoke"}, [below])
    run_stages([other], jobs=1)
    claims, judged = publish(figures, [other])
    assert judged == [{"name": "growth", "status": "differs", "differing": ["value"]}] and claims[0].measured == 3
    assert "figures: 1 differs (growth)" in closing_screen(claims, judged, figures)
    assert "encryption" not in capfd.readouterr().err


def fails(tmp_path: Path, *sources: str, kind=RunFailed):
    with pytest.raises(kind) as caught:
        run_stages([chapter_stage(write_notebook(tmp_path, "02_bad", *sources), {}, {}, [])], jobs=1)
    return caught.value


def test_a_failing_cell_names_chapter_cell_and_reason_and_keeps_what_ran(tmp_path):
    failure = fails(tmp_path, "print('before')", "# why\nvalue = missing\n", "print('after')")
    line = str(failure).splitlines()[0]
    assert line.startswith(
        "stage 02_bad failed: RuntimeError: cell 3 (`value = missing`): NameError: name 'missing' is not"
    )
    assert failure.exit_code == 1
    executed = nbformat.read(line.split("; see ")[1], as_version=4)
    assert any("before" in str(cell.get("outputs")) for cell in executed.cells)


def test_a_users_error_in_a_cell_ends_as_one(tmp_path):
    error = fails(
        tmp_path, "from influence_kit.errors import UserError\nraise UserError('no such language')", kind=UserError
    )
    assert str(error) == "no such language"


def test_a_dead_kernel_is_told_as_memory(tmp_path):
    failure = fails(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert failure.exit_code == 137
    assert "stage 02_bad: MemoryError: the chapter's kernel died, usually out of memory; " in str(failure)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_kernel_outlives_a_killed_run(tmp_path):
    write_notebook(
        tmp_path,
        "02_long",
        "import os, time\nopen(os.environ['TINY_CALLS'], 'w').write(str(os.getpid()))\ntime.sleep(99)",
    )
    script = tmp_path / "run.py"
    script.write_text(
        "from pathlib import Path\nfrom influence_kit.publishing.notebooks import chapter_stage\n"
        "from tests.runner.tiny_stages import run_stages\nif __name__ == '__main__':\n"
        f"    run_stages([chapter_stage(Path({str(tmp_path / '02_long.ipynb')!r}), {{}}, {{}}, [])], jobs=1)\n"
    )
    run = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    told, deadline = Path(os.environ["TINY_CALLS"]), time.monotonic() + 60
    while not (told.exists() and told.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kernel = Path("/proc", told.read_text())
    assert kernel.exists()
    run.kill()
    run.wait()
    deadline = time.monotonic() + 10
    while kernel.exists() and "Z" not in (kernel / "stat").read_text().rpartition(")")[2].split()[:1]:
        assert time.monotonic() < deadline, "the kernel lives on"
        time.sleep(0.1)


# --- parameters


@pytest.fixture
def chapters(tmp_path):
    return [write_notebook(tmp_path, "01_growth"), write_notebook(tmp_path, "02_more")]


def test_parameters_are_typed_by_the_chapter_and_offered_where_it_knows_them(chapters):
    given = {"count": "5", "scale": "3", "sizes": "4,5"}
    chosen = chosen_parameters(chapters, given, {"profile": "smoke", "unheard_of": 1})
    assert chosen["01_growth"] == {"profile": "smoke", "count": 5, "scale": 3.0, "sizes": [4, 5]} == chosen["02_more"]
    assert isinstance(chosen["01_growth"]["scale"], float)
    assert chosen_parameters(chapters, {"word": "7"}, {})["01_growth"] == {"word": "7"}


def test_what_a_chapter_has_by_default_is_no_change(chapters):
    assert chosen_parameters(chapters, {"count": "3", "scale": "2", "word": "plain"}, {})["01_growth"] == {}


@pytest.mark.parametrize("name", ["profile", "seeds", "real_text"])
def test_what_options_say_for_all_chapters_is_no_parameter_of_one(chapters, name):
    with pytest.raises(UserError, match=f"-p {name}=… would change the chapter and not what is made for it: use --"):
        chosen_parameters(chapters, {name: "1"}, {})


@pytest.mark.parametrize(
    ("name", "text"),
    [("count", "many"), ("count", "1.5"), ("count", "true"), ("sizes", "7"), ("scale", "nan"), ("scale", "1e999")],
)
def test_a_value_of_another_type_is_refused(chapters, name, text):
    with pytest.raises(UserError, match=rf"parameter {name} of 01_growth takes .* not '{text}'"):
        chosen_parameters(chapters, {name: text}, {})


@pytest.mark.parametrize(
    ("declared", "text", "allowed"),
    [
        ("top: float = 0.01", "0", "above 0 and at most 1 "),
        ("top: float = 0.01", "1.01", "above 0 and at most 1 "),
        ("top: float = 0.01", "-0.01", "above 0 and at most 1 "),
        ("scale = 2.0", "-3", "above 0 and at most 1e"),
        ("k: int = 5", "0", "at least 1 and at most 1e"),
        ("k: int = 5", "9" * 400, "at least 1 and at most 1e"),
        ("width: int = 0", "-1", "at least 0 and at most 1e"),
        ("query: int = -1", "-2", "at least -1 and at most 1e"),
    ],
)
def test_a_number_beyond_what_its_default_is_one_of_is_refused(tmp_path, declared, text, allowed):
    path = write_notebook(tmp_path, "01_growth")
    path.write_text(path.read_text().replace("count: int = 3", declared))
    name = declared.partition(":" if ":" in declared else " ")[0]
    with pytest.raises(UserError, match=f"parameter {name} of 01_growth must be {allowed}.*, not ") as error:
        chosen_parameters([path], {name: text}, {})
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("declared", "text", "value"),
    [
        ("top: float = 0.01", "1", 1.0),
        ("k: int = 5", "1", 1),
        ("width: int = 0", "64", 64),
        ("query: int = -1", "0", 0),
        ("scale = 2.0", "0.001", 0.001),
    ],
)
def test_the_ends_of_a_range_belong_to_it(tmp_path, declared, text, value):
    path = write_notebook(tmp_path, "01_growth")
    path.write_text(path.read_text().replace("count: int = 3", declared))
    name = declared.partition(":" if ":" in declared else " ")[0]
    assert chosen_parameters([path], {name: text}, {})["01_growth"] == {name: value}


def test_an_unknown_parameter_is_refused_with_the_known_ones(chapters):
    with pytest.raises(
        UserError, match="unknown parameter 'sede'; known are 01_growth: profile, seeds, scale, count, sizes, word; 02"
    ):
        chosen_parameters(chapters, {"sede": "1"}, {})


def test_what_is_no_notebook_is_refused(tmp_path):
    (tmp_path / "03.ipynb").write_text("{")
    with pytest.raises(UserError, match="not a notebook"):
        read_cells(tmp_path / "03.ipynb")
    with pytest.raises(UserError, match="there is no notebook"):
        read_cells(tmp_path / "04.ipynb")


def test_a_chapter_depends_on_its_cells_parameters_profile_and_stages(tmp_path):
    path = write_notebook(tmp_path, "01_growth", "1")
    one, two = stage("number", value=1), stage("number", value=2)
    prints = {chapter_stage(path, {}, {"steps": 1}, [one]).fingerprint for _ in range(2)}
    prints.add(chapter_stage(path, {"count": 1}, {"steps": 1}, [one]).fingerprint)
    prints.add(chapter_stage(path, {}, {"steps": 1}, [one], {"seeds": [1]}).fingerprint)
    prints.add(chapter_stage(path, {}, {"steps": 2}, [one]).fingerprint)
    prints.add(chapter_stage(path, {}, {"steps": 1}, [two]).fingerprint)
    write_notebook(tmp_path, "01_growth", "2")
    prints.add(chapter_stage(path, {}, {"steps": 1}, [one]).fingerprint)
    assert len(prints) == 6


def test_a_chapter_depends_on_what_files_of_the_users_hold_and_not_where_they_lie(tmp_path, monkeypatch):
    path = write_notebook(tmp_path, "01_growth", "1")

    def fingerprint(**own):
        return chapter_stage(path, own, {}, []).fingerprint

    for place in ("here", "there"):
        (tmp_path / place / "texts").mkdir(parents=True)
        (tmp_path / place / "texts" / "a.txt").write_text("a text")
    monkeypatch.chdir(tmp_path / "here")
    first = fingerprint(texts="texts")
    monkeypatch.chdir(tmp_path / "there")
    assert fingerprint(texts="texts") == first
    status = (tmp_path / "there" / "texts" / "a.txt").stat()
    (tmp_path / "there" / "texts" / "a.txt").write_text("b text")  # as long, and as old
    os.utime(tmp_path / "there" / "texts" / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint(texts="texts") != first
    assert fingerprint(texts="texts", model="gpt2") != fingerprint(texts="texts", model="gpt3")  # on a hub


# --- normalising and publishing


def test_what_a_chapter_found_is_the_first_paragraph_of_its_outputs_with_something_in_bold(tmp_path):
    def shown(*texts: str):
        cells = [nbformat.v4.new_markdown_cell("**not an output**")]
        for text in texts:
            output = nbformat.v4.new_output("display_data", {"text/markdown": text})
            cells.append(nbformat.v4.new_code_cell("1", outputs=[output]))
        path = tmp_path / "executed.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        return answer(path)

    said = shown("plain", "first\n\nso: **It rains\nin 3 of 4\nplaces.** (more)\n\nNot **this**", "**No.**")
    assert said == "so: It rains in 3 of 4 places. (more)"
    assert shown("Open: whether it rains", "| claim | **verdict** |") == "Open: whether it rains"
    assert shown() == shown("| claim | **verdict** |") == ""


def test_a_widget_is_taken_out_and_said():
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "0%|  |"}
    cell = nbformat.v4.new_code_cell("bar", outputs=[nbformat.v4.new_output("display_data", view)])
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {"state": {}}, "papermill": {"duration": 1}})
    notes = normalise(notebook)
    assert len(notes) == 1 and "widget" in notes[0] and "widget" not in to_text(notebook)


def finished(tmp_path: Path, chapter: str, *names: str):
    """A chapter as it lies in the cache, without executing anything."""
    from influence_kit.runner.stages import _seal

    made = chapter_stage(write_notebook(tmp_path, chapter, *names), {}, {}, [])
    part = made.beside(".part")
    (part / "claims").mkdir(parents=True)
    for name in names:
        (part / f"{name}.png").write_text(name)
    row = row_of(judged(Rule(chapter, chapter, "check", "it grows", confirm_above=0), over_seeds({})))
    write_json(part / "claims" / f"{chapter}.json", {"claims": [row]})
    _seal(made, part, {})
    return made


def test_other_chapters_stay_and_files_no_longer_made_go(tmp_path):
    figures = tmp_path / "figures"
    publish(figures, [finished(tmp_path, "01_one", "a", "b"), finished(tmp_path, "02_two", "c")])
    claims, _ = publish(figures, [finished(tmp_path, "01_one", "b", "d")])
    assert sorted(path.name for path in figures.glob("*.png")) == ["b.png", "c.png", "d.png"]
    assert [claim.chapter for claim in claims] == ["01_one", "02_two"]
    labels = [entry["label"] for entry in json.loads((figures / "provenance.json").read_text()).values()]
    assert sorted(labels) == ["01_one", "02_two"]


def test_publishing_again_touches_nothing(tmp_path):
    figures, chapter = tmp_path / "figures", finished(tmp_path, "01_one", "a")
    publish(figures, [chapter])
    before = {path: os.stat(path).st_mtime_ns for path in figures.rglob("*.png")}
    content = files(figures)
    publish(figures, [chapter])
    assert {path: os.stat(path).st_mtime_ns for path in before} == before and files(figures) == content


def test_a_claim_without_its_parts_is_refused(tmp_path):
    path = tmp_path / "01_one.json"
    for content in ([{"id": "x"}], {"changed": {}}, [3], "claims", 7, {"claims": {"a": 1}}):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"01_one.json holds a claim without its parts"):
            read_claims(path)


def test_a_damaged_file_of_figures_is_said_in_one_line(tmp_path):
    figures, chapter = tmp_path / "figures", finished(tmp_path, "01_one", "a")
    pandas.DataFrame({"x": [1.0]}).to_parquet(tmp_path / "a.parquet")
    for name, content, told in [
        ("claims/02_two.json", b'[{"id": ', "02_two.json is cut or damaged"),
        ("claims/02_two.json", b"\xff\xfe", "02_two.json is cut or damaged"),
        ("b.parquet", b"PAR1", "b.parquet cannot be read"),
        ("expected.json", b"{", "expected.json is not readable JSON"),
        ("expected.json", b'{"a": {"rows": 1}}', "expected.json says nothing to compare a with"),
    ]:
        publish(figures, [chapter])
        shutil.copy(tmp_path / "a.parquet", figures / "a.parquet")
        (figures / name).write_bytes(content)
        with pytest.raises(UserError, match=told) as caught:
            publish(figures, [chapter])
        assert "\n" not in str(caught.value)
        shutil.rmtree(figures)


def test_what_is_changed_stands_in_verdicts_and_tables_are_compared_with_the_plain_run(tmp_path):
    figures, chapter = tmp_path / "figures", finished(tmp_path, "01_one", "a")
    (tmp_path / "expected.json").write_text(json.dumps({"a": {"rows": 1, "columns": {}, "rtol": 0, "sd_share": 0}}))
    publish(figures, [chapter])
    pandas.DataFrame({"x": ["one"]}).to_parquet(figures / "a.parquet")
    assert publish(figures, [chapter])[1] == [{"name": "a", "status": "new"}]
    _, judged = publish(figures, [chapter], expected=tmp_path / "expected.json", changed={"top": 0.05})
    assert judged == [{"name": "a", "status": "reproduced"}]
    assert json.loads((figures / "verdicts.json").read_text())["changed"] == {"top": 0.05}


def test_a_runs_folder_says_what_was_changed(tmp_path):
    def folder(name="laptop", /, **changed):
        return Run(tmp_path, name, changed).folder.relative_to(tmp_path / "figures").as_posix()

    assert folder() == "laptop" and folder("mine", profile="mine.yaml") == "runs/mine"
    assert folder(seeds=[101, 102]) == "runs/laptop-seeds-101-102"
    assert folder(top=0.05, score="relatif") == "runs/laptop-score-relatif-top-0.05"
    assert folder("mine", profile="mine.yaml", k=3) == "runs/mine-k-3"
    ours, theirs = (folder(model=f"../{where}/pythia", prompt="Who’s there? " * 9) for where in ("ours", "theirs"))
    assert ours != theirs and re.fullmatch(r"runs/laptop-model-[\w.-]{1,60}", ours)
    assert (
        Run(tmp_path, "mine", {"profile": "mine.yaml", "k": 3}).expected == tmp_path / "figures/runs/mine/expected.json"
    )
    assert Run(tmp_path, "laptop", {"k": 3}).expected == tmp_path / "figures/laptop/expected.json"


def test_the_record_of_a_chapter_holds_no_path(tmp_path):
    chapter = finished(tmp_path, "01_one", "a")
    assert str(tmp_path) not in json.dumps({key: value for key, value in record(chapter).items() if key != "made"})


def other_run(folder, status, seeds=(101, 102, 103)):
    """A folder of figures with one claim, called "grows", of other seeds, that is confirmed or refuted."""
    made = over_seeds({seed: {"confirmed": 2, "refuted": -2}[status] + 0.1 * (seed % 3) for seed in seeds})
    rule = Rule("grows", "01_growth", "primary", "it grows", confirm_above=0, delta=0.1)
    write_json(folder / "claims" / "01_growth.json", [row_of(judged(rule, made))])
    return folder


def test_what_other_seeds_say_of_the_same_claims_is_kept(tmp_path):
    from influence_kit.publishing.results import claims_of, keep_other_seeds

    here = other_run(tmp_path / "here", "confirmed", (11, 12, 13))
    assert keep_other_seeds(here, other_run(tmp_path / "same", "confirmed")) == (1, 1)
    assert keep_other_seeds(here, other_run(tmp_path / "other", "refuted")) == (1, 0)
    kept = json.loads((here / "other_seeds.json").read_text())["grows"]
    assert kept["status"] == "refuted" and kept["seeds"] == [101, 102, 103]
    told = "Other seeds, 101, 102, 103: 0 of 1 confirmed again; grows refuted."
    assert told in closing_screen(claims_of(here)["01_growth"], [], here)


def test_claims_of_a_chapter_that_it_did_not_conclude_are_named(tmp_path):
    from influence_kit.findings.fixed import fixed_claims
    from influence_kit.publishing.results import unconcluded

    publish(tmp_path / "figures", [finished(tmp_path, "03_heavy_tails", "a")])
    every = [judged(rule, over_seeds({})) for rule in fixed_claims().values()]
    some = [claim for claim in every if claim.id != "03-power-law"]
    assert unconcluded(some, tmp_path / "figures") == ["Not concluded: 03-power-law."]
    assert unconcluded(every, tmp_path / "figures") == []


def test_other_seeds_must_be_others_and_have_the_claims(tmp_path):
    from influence_kit.publishing.results import keep_other_seeds

    here = other_run(tmp_path / "here", "confirmed", (11, 12, 13))
    with pytest.raises(UserError, match="has seeds of"):
        keep_other_seeds(here, other_run(tmp_path / "twice", "confirmed", (13, 14, 15)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no claim of those"):
        keep_other_seeds(here, tmp_path / "empty")
