"""What is promised of the package as a thing to install: pins, dependencies, import time, notebooks, style."""

import ast
import hashlib
import json
import re
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from influence_kit.runner.doctor import read_pins, requirements, unmet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = read_pins(ROOT / "constraints.txt")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What pip brings along by itself, and what a build of torch for this machine alone asks for.
OUTSIDE = {"pip", "setuptools", "wheel"}


def third_party_imports() -> dict[str, set[str]]:
    """Distribution -> modules of the package that import it."""
    distributions = metadata.packages_distributions()
    found: dict[str, set[str]] = {}
    for path in (ROOT / "influence_kit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            for name in {name.split(".")[0] for name in names} - {"influence_kit"} - set(sys.stdlib_module_names):
                for distribution in set(distributions[name]):
                    found.setdefault(canonicalize_name(distribution), set()).add(path.name)
    return found


def needed_distributions(lines: list[str]) -> dict[str, str]:
    """Name -> installed version of all that these requirements bring into an environment like this one."""
    waiting, seen = [Requirement(line) for line in lines], set()
    found = {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen or name in OUTSIDE:
            continue
        seen.add((name, frozenset(requirement.extras)))
        distribution = metadata.distribution(name)
        found[name] = distribution.version.split("+")[0]
        for below in map(Requirement, distribution.requires or []):
            extras = ("", *requirement.extras)
            if below.marker is None or any(below.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(below)
    return found


def test_dependencies_are_exactly_what_is_imported():
    listed, imported = set(requirements(PROJECT, extras=())), third_party_imports()
    assert listed - set(imported) == set(), "asked for, but imported nowhere"
    unlisted = {name: where for name, where in imported.items() if name not in listed}
    assert unlisted == {}, "imported, but not asked for"


def test_constraints_pin_exactly_what_the_environment_needs():
    extras = PROJECT["optional-dependencies"].values()
    needed = needed_distributions([*PROJECT["dependencies"], *(line for extra in extras for line in extra)])
    # A CUDA build of torch brings the makers' libraries, which it pins itself.
    needed = {name: version for name, version in needed.items() if not name.startswith(("nvidia-", "triton", "cuda-"))}
    assert set(PINS) == set(needed)


def test_pins_agree_with_pyproject_and_carry_no_local_suffix():
    extras = PROJECT["optional-dependencies"].values()
    for line in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)]), line
    assert not any("+" in version for version in PINS.values())
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert lines == sorted(lines, key=lambda line: line.split("==")[0].lower())


def test_the_running_environment_is_the_pinned_one():
    assert unmet(ROOT) == []


def test_environment_yml_installs_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert environment["name"] == "influence_kit" and conda == ["python=3.11", "pip"]
    # conda and mamba hand these lines to pip as a requirements file beside environment.yml: paths are relative to it.
    assert pip["pip"] == ["-c constraints.txt", f"-e .[{','.join(sorted(PROJECT['optional-dependencies']))}]"]
    python = Requirement(f"python{PROJECT['requires-python']}")
    assert python.specifier.contains("3.11.0") and (ROOT / "constraints.txt").is_file()


def test_profiles_claims_sentences_and_word_lists_are_package_data():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert data == {
        "influence_kit.corpora.sentences": ["*.yaml"],
        "influence_kit.corpora.worlds": ["lists/*.yaml"],
        "influence_kit.findings": ["claims.yaml", "profiles/*.yaml"],
    }
    assert {"smoke.yaml", "laptop.yaml"} <= {path.name for path in ROOT.glob("influence_kit/findings/profiles/*.yaml")}


def test_importing_the_package_is_quick_and_light():
    code = "import influence_kit, sys; print(*sys.modules)"
    times = []
    for _ in range(3):
        began = time.monotonic()
        loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        times.append(time.monotonic() - began)
    assert min(times) < 2
    heavy = {"datasets", "matplotlib", "pandas", "transformers", "torch", "IPython", "papermill", "pyarrow"}
    assert not heavy & set(loaded.stdout.split())


def test_the_command_line_starts_without_what_only_chapters_need():
    code = "import influence_kit.cli, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"datasets", "matplotlib", "papermill", "nbformat", "torch"} & set(loaded.stdout.split())


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_sources_are_plain(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


def test_nothing_that_ships_names_a_place_of_its_making():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    places = re.compile(rb"/(?:work|opt|tmp)/\w|(?:pypi|anaconda|pytorch)\.org")
    texts = (".py", ".md", ".ipynb", ".toml", ".txt", ".yml", ".yaml", ".json", ".sh", ".cff", ".svg", ".html", "run")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name.endswith(texts)]
    assert {path.name: found for path in paths if path.is_file() and (found := places.findall(path.read_bytes()))} == {}


def test_the_licence_is_the_standard_text():
    words = b" ".join((ROOT / "LICENSE").read_bytes().split())
    assert hashlib.sha256(words).hexdigest() == "0ffddef9e48f8a09aed5caf2d44f7ba1c1be2d9b8e0a6f693b1635b2d5566645"


def test_the_citation_names_kit_and_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = citation["preferred-citation"]
    assert citation["license"] == PROJECT["license"] and citation["title"] == "influence_kit"
    assert len(paper["authors"]) == 17 and paper["year"] == 2023 and "2308.03296" in paper["url"]
    version = re.search(r'__version__ = "(.+)"', (ROOT / "influence_kit" / "__init__.py").read_text())
    assert version and citation["version"] == version[1]


def test_ruff_finds_nothing():
    found = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:]


@pytest.mark.parametrize("script", ["run_all.sh", ".ci/run"])
def test_scripts_are_sound_and_executable(script):
    path = ROOT / script
    assert path.stat().st_mode & 0o111 and path.read_text().startswith("#!/usr/bin/env bash\n")
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


def test_help_needs_no_environment(tmp_path):
    shown = subprocess.run([ROOT / "run_all.sh", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=10)
    assert shown.returncode == 0 and "--profile smoke|laptop|real|gpu|hub" in shown.stdout


@pytest.mark.slow
def test_mypy_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
