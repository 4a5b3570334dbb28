"""README: its written parts come from the committed run, its links lead somewhere, its commands exist."""

import re
import shutil

import pytest

from influence_kit.errors import UserError
from influence_kit.publishing import readme
from influence_kit.runner.machine import repository

ROOT = repository()
TEXT = (ROOT / "README.md").read_text()


def test_written_parts_are_those_of_the_committed_run():
    folder = ROOT / "figures" / "laptop"
    parts = {"verdicts": readme.verdicts(folder), "times": readme.times(folder)}
    assert readme.fill(TEXT, parts | {"real": readme.real(ROOT / "figures" / "real")}) == TEXT


def test_every_link_and_picture_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_parameters_that_the_readme_names_exist():
    from influence_kit.publishing.notebooks import known_parameters

    for chapter, options in re.findall(r"run_all\.sh --only (\d\d) ((?:-p \S+=(?:\"[^\"]*\"|\S+) ?)+)", TEXT):
        (path,) = (ROOT / "notebooks").glob(f"{chapter}_*.ipynb")
        assert set(re.findall(r"-p (\w+)=", options)) <= set(known_parameters(path))


def test_time_alone_is_half_of_the_stages_and_the_chapter_itself():
    def entry(kind, label, seconds, **more):
        return {"kind": kind, "label": label, "wall_seconds": seconds, **more}

    known = {
        "a": entry("model", "train x, seed 11", 60),
        "b": entry("model", "train x, seed 12", 100),
        "c": entry("text", "real text", 20),
    }
    known |= {"d": entry("chapter", "03_y", 30, stages=["a", "b", "c"]), "e": entry("model", "train z, seed 11", 900)}
    assert readme.times_alone(known).splitlines()[2:] == ["| 03_y | 3 | 2:00 | 1:10 | 0:30 |"]


def test_the_whole_run_is_said_with_the_machines_load():
    about = {"commit": "0123456789", "dirty": False, "seconds": 4500.0, "cores": 2, "load": {"before": 0.1, "after": 2}}
    about |= {"stages_made": 9, "stages": 9}
    told = "The whole run: 1:15:00 on 2 cores (load 0.1 when it began), 9 of 9 stages made, commit 0123456."
    assert readme.whole_run(about) == told and readme.whole_run({}) == ""
    assert "commit 0123456 and changes" in readme.whole_run(about | {"dirty": True})
    assert "no commit" in readme.whole_run(about | {"commit": None, "load": {"before": None}})


def test_a_missing_place_is_said():
    with pytest.raises(UserError, match="no place for 'speed'"):
        readme.fill(TEXT, {"speed": "x"})


def test_layout_names_what_is_there():
    for name in re.findall(r"^  ([a-z_]+(?:\.py|/)) ", TEXT, re.M):
        assert (ROOT / "influence_kit" / name).exists(), name
    assert shutil.which("bash") and (ROOT / "run_all.sh").stat().st_mode & 0o111
