import functools
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from influence_kit import cli
from influence_kit.cli import main, select, split, unfold
from influence_kit.errors import UserError
from influence_kit.publishing import notebooks
from influence_kit.runner.stages import Cost
from tests.publishing.test_notebooks import write_notebook
from tests.runner.conftest import own_cache  # noqa: F401  its stages are tiny ones
from tests.runner.tiny_stages import calls, stage

REPOSITORY = Path(__file__).parents[1]
CHAPTERS = ["01_growth", "02_more"]


class TinyProfile:
    """What the command line asks of a profile."""

    chapters = ()

    def __init__(self, name: str, seeds: list[int] | None, real_text: bool):
        self.name, self.seeds, self.real_text = name, seeds or [0], real_text

    def model_dump(self, mode: str) -> dict:
        return {"name": self.name, "seeds": self.seeds, "real_text": self.real_text}


def load_profile(name: str, seeds: list[int] | None = None, real_text: bool = True) -> TinyProfile:
    if name not in ("smoke", "laptop"):
        raise UserError(f"unknown profile {name!r}; there are laptop, smoke")
    return TinyProfile(name, seeds, real_text)


def changed_from(name: str, seeds: list[int] | None = None, real_text: bool = True) -> dict:
    changed = {} if seeds in (None, [0]) else {"seeds": seeds}
    return changed if real_text else changed | {"real_text": False}


def chapters_for(profile: TinyProfile) -> list[str]:
    return CHAPTERS


def stages_for(profile: TinyProfile, chapter: str, given: dict | None = None) -> list:
    shared = [stage("number", f"model {seed}", value=seed, cost=Cost(2)) for seed in profile.seeds]
    real = [stage("surroundings", "real text")] if profile.real_text and chapter == "02_more" else []
    return [*shared, stage("total", f"sum {chapter}", dict(enumerate_names(shared)), of=chapter), *real]


def enumerate_names(stages):
    return ((str(number), each) for number, each in enumerate(stages))


def no_check(todo) -> None:
    pass


@pytest.fixture
def kit(tmp_path, monkeypatch):
    """Two tiny chapters with tiny stages in place of the package's own, in a checkout of their own."""
    offered = {"chapter_names": lambda: CHAPTERS, "chapters_for": chapters_for, "stages_for": stages_for}
    chapters = types.SimpleNamespace(CHECKS=[no_check], **offered)
    monkeypatch.setitem(sys.modules, "influence_kit.findings.discovery", chapters)
    asked = {"load_profile": load_profile, "changed_from": changed_from, "profile_names": lambda: ["laptop", "smoke"]}
    profiles = types.SimpleNamespace(**asked)
    monkeypatch.setitem(sys.modules, "influence_kit.findings.profiles", profiles)
    folder = tmp_path / "checkout" / "notebooks"
    folder.mkdir(parents=True)
    for chapter in CHAPTERS:
        write_notebook(
            folder, chapter, "import os", f"open(os.environ['INFLUENCE_KIT_FIGURES'] + '/{chapter}.png', 'w').close()"
        )
    monkeypatch.setattr(notebooks, "notebooks_folder", lambda: folder)
    monkeypatch.setenv(cli.NO_TEXT, "0")  # a run leaves it in its environment
    monkeypatch.setattr(cli, "repository", lambda: folder.parent)
    return folder.parent


# --- words into meaning


def test_values_may_be_repeated_listed_or_parted_by_commas():
    assert unfold(["run", "--only", "03", "05", "--jobs", "2"]) == [
        "run",
        "--only",
        "03",
        "--only",
        "05",
        "--jobs",
        "2",
    ]
    assert unfold(["run", "--only", "03", "--seeds", "0", "1"]) == [
        "run",
        "--only",
        "03",
        "--seeds",
        "0",
        "--seeds",
        "1",
    ]
    assert unfold(["run", "--plan", "-p", "x=1"]) == ["run", "--plan", "-p", "x=1"]
    assert split(["0,1", "2"]) == ["0", "1", "2"]


def test_chapters_are_found_by_number_or_name():
    chapters = ["00_start_here", "03_heavy_tails", "05_cross_lingual"]
    assert select([], chapters) == chapters
    assert select(["05", "00"], chapters) == ["00_start_here", "05_cross_lingual"]
    assert (
        select(["03_heavy_tails"], chapters)
        == select(["notebooks/03_heavy_tails.ipynb"], chapters)
        == ["03_heavy_tails"]
    )
    with pytest.raises(
        UserError, match="unknown chapter '3'; there are 00_start_here, 03_heavy_tails, 05_cross_lingual"
    ):
        select(["3"], chapters)


def test_without_a_profile_it_is_laptop_or_the_shortest_that_names_a_chapter_which_laptop_has_not(
    kit, capfd, monkeypatch
):
    names = {"laptop": (), "hours": ("03_apart",), "other": ("01",), "real": ("03_apart",), "smoke": ()}

    def load(name: str, seeds: list[int] | None = None, real_text: bool = True) -> TinyProfile:
        made = TinyProfile(name, seeds, real_text)
        made.chapters, made.minutes = names[name], 600 if name == "hours" else 20
        return made

    both = [*CHAPTERS, "03_apart"]
    discovery, profiles = (sys.modules[f"influence_kit.findings.{name}"] for name in ("discovery", "profiles"))
    monkeypatch.setattr(discovery, "chapter_names", lambda: both)
    monkeypatch.setattr(discovery, "chapters_for", lambda profile: CHAPTERS if profile.name == "laptop" else both)
    monkeypatch.setattr(profiles, "load_profile", load)
    monkeypatch.setattr(profiles, "profile_names", lambda: sorted(names))
    write_notebook(kit / "notebooks", "03_apart", "import os")
    for only, name in ([], "laptop"), (["01"], "laptop"), (["03"], "real"), (["01", "03"], "laptop"):
        assert cli._profile_of(select(only, both) if only else []) == name
    assert cli._chosen(load("laptop"), []) == (CHAPTERS, CHAPTERS)
    assert cli._chosen(load("smoke"), []) == (both, both)
    assert main(["run", "--only", "03", "--jobs", "1"]) == 0
    assert (kit / "figures" / "real" / "notebooks" / "03_apart.ipynb").is_file()
    capfd.readouterr()
    assert main(["run", "--profile", "laptop", "--only", "03"]) == 2
    told = "profile 'laptop' is not for 03_apart, but for 01_growth, 02_more: leave --profile out, or choose another"
    assert capfd.readouterr().err.strip() == f"error: {told}"


# --- what a user gets wrong ends in one line, exit code 2, before any work


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "--profile", "huge"], "unknown profile 'huge'; there are laptop, smoke"),
        (["run", "--only", "07"], "unknown chapter '07'; there are 01_growth, 02_more"),
        (["run", "-p", "sede=1"], "unknown parameter 'sede'; known are"),
        (["run", "-p", "count=many"], "parameter count of 01_growth takes int (default 3), not 'many'"),
        (["run", "-p", "count"], "-p takes NAME=VALUE, not 'count'"),
        (["run", "-p", "scale=1e999"], "parameter scale of 01_growth takes float (default 2.0), not '1e999'"),
        (
            ["run", "-p", "profile=laptop"],
            "-p profile=… would change the chapter and not what is made for it: use --profile",
        ),
        (["run", "-p", "seeds=[1]"], "use --seeds"),
        (
            ["run", "--seeds", "1", "--update-expected"],
            "--update-expected keeps the tables of a profile's plain run: leave out",
        ),
        (["run", "--seeds", "one"], "--seeds takes whole numbers"),
        (["run", "--seeds", "28-21"], "--seeds takes whole numbers and ranges of them (0,1,2 or 21-28), not '28-21'"),
        (["run", "--seeds", "21-"], "not '21-'"),
        (["run", "--seeds", "0-9999999999"], "more than 1000 seeds"),
        (["run", "--force", "modle"], "--force knows no 'modle'; it takes all, chapter, number, "),
        (["run", "--jobs", "0"], "--jobs"),
        (["run", "--force", ""], "an option of --only, --seeds or --force is empty: give it a value"),
        (["run", "--seeds", ","], "an option of --only, --seeds or --force is empty"),
        (["run", "--bogus"], "No such option: --bogus"),
        (["flee"], "No such command 'flee'"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line_before_any_work(kit, capfd, words, told):
    assert main(words) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and told in lines[0]
    assert calls() == []


# --- runs


def test_plan_shows_stages_and_does_nothing(kit, capfd):
    assert main(["run", "--profile", "smoke", "--plan", "--seeds", "0", "1", "--without-real-text", "--jobs", "2"]) == 0
    shown = capfd.readouterr().out
    assert [line.split("  ")[0] for line in shown.splitlines()[1:-1]] == [
        "model 0", "model 1", "sum 01_growth", "sum 02_more", "01_growth", "02_more",
    ]  # fmt: skip
    assert "6 to do, 0 cached; on 2 processes" in shown and calls() == []


def test_stages_alone_need_no_notebook_package(kit):
    code = f"""
import sys, types
sys.path.insert(0, {str(REPOSITORY)!r})
from tests.runner import tiny_stages
def stages_for(profile, chapter, given=None):
    return [tiny_stages.stage("number", value=1)]
only = {{"chapter_names": lambda: ["01"], "chapters_for": lambda profile: ["01"], "CHECKS": [], "stages_for": stages_for}}
sys.modules["influence_kit.findings.discovery"] = types.SimpleNamespace(**only)
sys.modules["influence_kit.findings.profiles"] = types.SimpleNamespace(load_profile=lambda name, seeds, real_text: types.SimpleNamespace(chapters=()))
from influence_kit.cli import main
if __name__ == "__main__":
    code = main(["stages", "--jobs", "1"])
    heavy = {{"papermill", "nbformat", "nbclient", "datasets", "matplotlib", "pandas"}} & set(sys.modules)
    assert not heavy, heavy
    sys.exit(code)
"""
    script = kit / "stages.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1 stages made\n"), done.stderr
    assert calls() == ["number 1", "end 1"]


def test_run_executes_chapters_then_finds_all_of_it_done(kit, capfd):
    words = ["run", "--profile", "smoke", "--jobs", "2"]
    assert main(words) == 0
    figures = kit / "figures" / "smoke"
    assert {"01_growth.png", "02_more.png", "verdicts.json", "provenance.json", "run.json"} <= {
        path.name for path in figures.iterdir()
    }
    executed = (figures / "notebooks" / "01_growth.ipynb").read_text()
    assert 'profile = \\"smoke\\"' in executed
    assert "6 made, 0 from the cache" in capfd.readouterr().out
    took = json.loads((figures / "run.json").read_text())
    assert took["stages_made"] == took["stages"] == 6 and took["seconds"] > 0 and took["chapters"] == CHAPTERS
    assert took["changed"] == {} and set(took) >= {"commit", "dirty", "cores"}
    before, written = calls(), (figures / "run.json").read_bytes()
    assert main(words) == 0
    assert "0 made, 6 from the cache" in capfd.readouterr().out and calls() == before
    # Forcing a kind makes it alone again, since it comes out the same.
    assert main([*words, "--only", "01", "--force", "number"]) == 0
    assert "1 made, 2 from the cache" in capfd.readouterr().out
    assert json.loads((figures / "verdicts.json").read_text())["claims"] == []
    assert (figures / "run.json").read_bytes() == written  # of the whole run
    assert not (kit / "figures" / "runs").exists()


def lying(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_changed_goes_to_a_folder_of_its_own_and_is_said(kit, capfd, monkeypatch):
    words = ["run", "--profile", "smoke", "--jobs", "2"]
    found = "import os\nfrom IPython.display import Markdown\nMarkdown('**It grew.** And more.')"
    write_notebook(kit / "notebooks", "01_growth", found)
    assert main(words) == 0
    plain = lying(kit / "figures" / "smoke")
    assert "It grew" not in capfd.readouterr().out  # of all chapters at once the verdicts are enough
    assert main([*words, "-p", "count=4", "--only", "01"]) == 0
    folder = kit / "figures" / "runs" / "smoke-count-4"
    shown = capfd.readouterr()
    assert f"count=4: results of 01_growth go to {folder}\n" in shown.err and f"see {folder}" in shown.out
    assert shown.out.endswith("01_growth: It grew. And more.\n")
    assert json.loads((folder / "verdicts.json").read_text())["changed"] == {"count": 4}
    assert json.loads((folder / "run.json").read_text())["changed"] == {"count": 4}
    (chapter,) = [e for e in json.loads((folder / "provenance.json").read_text()).values() if e["kind"] == "chapter"]
    assert chapter["changed"] == {"count": 4} and chapter["given"] == {"profile": "smoke", "count": 4}
    assert not (folder / "02_more.png").exists()

    assert main([*words, "--seeds", "1", "2"]) == 0
    assert (kit / "figures" / "runs" / "smoke-seeds-1-2" / "02_more.png").exists()
    assert cli._seeds(["1-2", "2", "7"]) == [1, 2, 7]  # one listed twice counts once
    assert main([*words, "--without-real-text"]) == 0
    assert (kit / "figures" / "runs" / "smoke-no-real_text" / "02_more.png").exists()
    assert lying(kit / "figures" / "smoke") == plain
    # What a chapter or profile says anyway is no change.
    monkeypatch.setenv(cli.NO_TEXT, "0")
    capfd.readouterr()
    assert main([*words, "--seeds", "0", "-p", "count=3", "-p", "scale=2"]) == 0
    assert "0 made, 6 from the cache" in capfd.readouterr().out and lying(kit / "figures" / "smoke") == plain


def test_claims_that_no_run_wrote_are_not_published_again(kit, capfd):
    claims = "import json\nfrom pathlib import Path\nfolder = Path(os.environ['INFLUENCE_KIT_FIGURES'], 'claims')\nfolder.mkdir()\n"
    for chapter in CHAPTERS:
        kept = f"size = (folder / '{chapter}.json').write_text('[]')"
        write_notebook(kit / "notebooks", chapter, "import os", claims + kept)
    words = ["run", "--profile", "smoke", "--jobs", "2"]
    assert main(words) == 0
    path = kit / "figures" / "smoke" / "claims" / "02_more.json"
    path.write_text("[ ]")
    before = calls()
    capfd.readouterr()
    assert main([*words, "--only", "01", "--force", "number"]) == 2
    assert f"error: {path} is not what its run wrote: run that chapter again (--only 02_more)" in capfd.readouterr().err
    assert calls() == before
    assert main([*words, "--only", "02"]) == 0 and path.read_text() == "[]"
    assert main([*words, "--only", "01"]) == 0


@pytest.mark.parametrize(
    ("place", "harm", "told"),
    [
        ("figures", lambda path: path.write_text(""), "figures is a file where a folder should be: move it away"),
        (
            "figures/smoke/provenance.json",
            lambda path: path.write_text('{"a": {'),
            "provenance.json is not readable JSON",
        ),
        (
            "figures/smoke/provenance.json",
            lambda path: path.write_text('{"a": {}}'),
            "holds an entry without its parts",
        ),
        (
            "figures/smoke/provenance.json",
            lambda path: path.write_text("[]"),
            "provenance.json holds list, not an object",
        ),
        ("figures/smoke/provenance.json", Path.mkdir, "provenance.json is not readable JSON"),
    ],
)
def test_a_damaged_figures_folder_is_said_before_any_work(kit, capfd, place, harm, told):
    (kit / place).parent.mkdir(parents=True, exist_ok=True)
    harm(kit / place)
    assert main(["run", "--profile", "smoke"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and told in lines[0] and calls() == []


def test_lab_opens_a_chapter_with_this_environment(kit, monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr("influence_kit.publishing.lab.notebooks_folder", lambda: kit / "notebooks")
    monkeypatch.setattr(os, "execv", lambda program, words: told.append([program, *words]))
    before = dict(os.environ)
    try:
        assert main(["lab", "02", "--no-browser"]) == 0
        assert (
            os.environ["JUPYTER_PATH"] == str(tmp_path / "cache" / "lab")
            and os.environ["INFLUENCE_KIT_CWD"] == os.getcwd()
        )
    finally:
        os.environ.clear()
        os.environ.update(before)
    words = told[0]
    assert words[0] == words[1] == sys.executable and words[2:4] == ["-m", "jupyterlab"]
    assert words[-1] == str(kit / "notebooks" / "02_more.ipynb") and "--no-browser" in words
    assert f"--ServerApp.root_dir={kit}" in words
    assert main(["lab", "07"]) == 2


def test_ctrl_c_ends_with_130_and_leaves_no_process(kit, tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(f"""
import sys, types
sys.path.insert(0, {str(REPOSITORY)!r})
from tests.runner import tiny_stages
only = {{"chapter_names": lambda: ["01"], "chapters_for": lambda profile: ["01"], "CHECKS": []}}
only["stages_for"] = lambda profile, chapter, given=None: [tiny_stages.stage("slow")]
sys.modules["influence_kit.findings.discovery"] = types.SimpleNamespace(**only)
sys.modules["influence_kit.findings.profiles"] = types.SimpleNamespace(load_profile=lambda name, seeds, real_text: types.SimpleNamespace(chapters=()))
from influence_kit.cli import main
if __name__ == "__main__":
    sys.exit(main(["stages"]))
""")
    # A suite that runs in the background of a script inherits a Ctrl-C that is ignored.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 30
    while not calls():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and "interrupted; finished stages are kept" in error
    worker = int(Path(os.environ["TINY_CALLS"]).read_text().split()[3])
    assert not Path(f"/proc/{worker}").exists()


def test_help_names_every_command(capfd):
    assert main(["--help"]) == 0
    shown = capfd.readouterr().out
    assert all(command in shown for command in ("run", "stages", "test", "doctor"))


def test_doctor_gives_each_warning_a_remedy(capfd):
    assert main(["doctor"]) == 0
    lines = capfd.readouterr().out.splitlines()
    subjects = ["python", "packages", "disk", "cache", "memory", "cores", "fonts", "apt", "gpu"]
    assert [line.split(maxsplit=1)[1].split()[0].strip(":") for line in lines] == subjects
    assert all(line.startswith("ok") or (line.startswith("warn") and line.count(": ") >= 1) for line in lines)


def test_test_hands_its_words_to_pytest(kit):
    shown = subprocess.run(
        [sys.executable, "-m", "influence_kit", "test", "--version"],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip
    assert shown.returncode == 0 and "pytest" in shown.stdout + shown.stderr
