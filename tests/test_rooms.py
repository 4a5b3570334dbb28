"""The package is built as it says: which rooms may use which, no two files in a circle, and a chapter is one room."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "influence_kit"
LEAVES = {"errors", "files", "hub", "packages", "recipes", "weights"}  # anyone may use these; they use each other alone
MAY_USE = {
    "engine": set(),
    "runner": LEAVES,
    "corpora": LEAVES,
    "models": LEAVES,
    "measures": LEAVES | {"corpora", "models"},
    "referees": LEAVES | {"corpora", "models", "engine"},
    "reading": LEAVES | {"corpora", "measures", "engine"},
    "findings": LEAVES | {"engine", "runner", "corpora", "models", "measures", "referees", "reading"},
    "publishing": LEAVES | {"runner", "corpora", "measures", "reading", "findings"},
    "cli": LEAVES | {"engine", "runner", "corpora", "findings", "publishing"},
    "__main__": {"cli"},
    "__init__": {"engine", "errors", "findings"},
} | {leaf: LEAVES for leaf in LEAVES}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str) -> set[str]:
    """Modules of the package that a module imports anywhere: at its top, in functions, for a type checker."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return found & set(MODULES) - {module}


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", MODULES)
def test_a_room_uses_those_below_it_alone(module):
    used = {room(other) for other in imports(module)} - {room(module)}
    assert used <= MAY_USE[room(module)], f"{module} must not use {sorted(used - MAY_USE[room(module)])}"


def test_no_files_import_each_other_in_a_circle():
    arrows = {module: imports(module) for module in MODULES}
    while ends := {module for module, used in arrows.items() if not used & set(arrows)}:
        arrows = {module: used for module, used in arrows.items() if module not in ends}
    circle = {module: sorted(used & set(arrows)) for module, used in arrows.items()}
    assert not circle, circle


MODULE = '''"""A chapter of a test: how many sequences a scan read."""

from __future__ import annotations

from pathlib import Path

from influence_kit.corpora.world import World
from influence_kit.findings.families import Planned, planted_grid
from influence_kit.findings.profiles import Profile


def reads(profile: Profile) -> list[Planned]:
    """The smallest models of Atlas, counted."""
    return planted_grid(profile, "atlas", widths=[16], extra=("counted",))


def counted(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Write how many sequences the world has, times what the profile says."""
    (out / "count.txt").write_text(str(parameters["times"] * World.load(inputs["world"]).sequences.num_rows))


STAGES = {"counted": counted}
'''
CELLS = [
    ("markdown", "# Toy\n\nHow many sequences are there?", []),
    ("code", 'profile = "smoke"\nseeds: list | None = None', ["parameters"]),
    (
        "code",
        "import pandas as pd\nfrom matplotlib import pyplot as plt\n\n"
        "from influence_kit.findings.chapter import Chapter\nfrom influence_kit.measures.intervals import over_seeds\n\n"
        'chapter = Chapter("99_toy", profile, seeds)\n'
        'runs = chapter.atlas(widths=[16], extra=("counted",))\n'
        'counts = [int((run.extra("counted") / "count.txt").read_text()) for run in runs]\n'
        "fig, ax = plt.subplots()\nax.plot(counts)\n"
        'chapter.figure(fig, "99_counts", pd.DataFrame({"count": counts}), "counts")',
        [],
    ),
    ("code", 'chapter.conclude("99-counted", over_seeds({run.seed: n for run, n in zip(runs, counts)}))', []),
]
CLAIM = """
99-counted:
  chapter: 99_toy
  tier: primary
  short: There are some
  claim: The world holds sequences
  paper: some
  confirm_above: 0
  delta: 1
"""


@pytest.mark.slow
def test_a_chapter_is_a_notebook_a_module_and_a_few_lines_of_yaml(tmp_path):
    copy = tmp_path / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file() and not name.startswith("figures/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    cells = [
        {"cell_type": kind, "id": f"cell-{n}", "metadata": {"tags": tags}, "source": source}
        | ({"outputs": [], "execution_count": None} if kind == "code" else {})
        for n, (kind, source, tags) in enumerate(CELLS)
    ]
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    (copy / "notebooks" / "99_toy.ipynb").write_text(json.dumps(notebook))
    (copy / "influence_kit" / "findings" / "toy.py").write_text(MODULE)
    with open(copy / "influence_kit" / "findings" / "claims.yaml", "a") as claims:
        claims.write(CLAIM)
    profile = copy / "influence_kit" / "findings" / "profiles" / "smoke.yaml"
    text = profile.read_text()
    start = text.index("\natlas:\n")
    place = text.index("  extra:\n", start) + len("  extra:\n")
    assert place < text.index("\nladder:", start)
    profile.write_text(f"{text[:place]}    counted: {{times: 2}}\n{text[place:]}")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"INFLUENCE_KIT_CACHE": str(tmp_path / "cache")}
    environment.pop("PYTHONPATH", None)
    command = ["./run_all.sh", "--profile", "smoke", "--only", "99"]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "99  There are some  undecided" in done.stdout
    assert (copy / "figures" / "smoke" / "99_counts.parquet").is_file()
