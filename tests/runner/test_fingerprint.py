"""A fingerprint changes with the code that can be reached, and with no other: on a small package, and on this one."""

import json
import shutil
from pathlib import Path

import pytest

from influence_kit.runner import fingerprint
from influence_kit.runner.fingerprint import cells_digest, source_digest

ROOT = Path(__file__).resolve().parents[2]
STAGES = '''
"""Two stages beside each other."""
from typing import TYPE_CHECKING

import influence_kit.models
from influence_kit.engine import score as rank
from influence_kit.runner.stages import ensure

if TYPE_CHECKING:
    from influence_kit import reading

WIDTH = 3


def widen(x):
    return x * WIDTH


def train(parameters, inputs, out, progress):
    """Train."""
    return influence_kit.models.fit(widen(1))


def score(parameters, inputs, out, progress):
    from .. import lazily
    return rank(lazily.y)
'''
FILES = {
    "__init__.py": "",
    "models.py": "from influence_kit.deeper import x\ndef fit(z):\n    return z + x\ndef show(z):\n    return z\n",
    "deeper.py": "x = 1\nother = 2\n",
    "engine/__init__.py": '_HOME = {"score": "scans"}\n',
    "engine/scans.py": "def score(x):\n    return x\n",
    "lazily.py": "y = 1\nz = 1\n",
    "reading.py": "z = 1\n",
    "runner/__init__.py": "",
    "runner/stages.py": "def ensure(): ...\n",
    "findings/__init__.py": "",
    "findings/stages.py": STAGES,
}


def forget():
    for function in (fingerprint.source_digest, fingerprint._read, fingerprint._location):
        function.cache_clear()


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """Returns a function that edits a file of a package and takes digests anew."""
    root = tmp_path / "package" / "influence_kit"
    monkeypatch.setattr(fingerprint, "PACKAGE_FOLDER", root)

    def edit(digests, name="", old="", new=""):
        if name:
            text = (root / name).read_text()
            assert old in text
            (root / name).write_text(text.replace(old, new, 1) if old else text + new)
        forget()
        return digests()

    yield root, edit
    forget()


@pytest.mark.parametrize(
    ("name", "old", "new", "changes"),
    [
        ("models.py", "", "\n\n# a comment\n", (False, False)),
        ("findings/stages.py", '"""Train."""', '"""Train well."""', (False, False)),
        ("findings/stages.py", "WIDTH = 3", "WIDTH = 3  # as in the paper", (False, False)),
        ("reading.py", "z = 1", "z = 2", (False, False)),  # for type checkers alone
        ("runner/stages.py", "...", "return 1", (False, False)),  # machinery
        (
            "models.py",
            "def show(z):\n    return z",
            "def show(z):\n    return -z",
            (False, False),
        ),  # beside what is used
        ("deeper.py", "other = 2", "other = 3", (False, False)),
        ("lazily.py", "z = 1", "z = 2", (False, False)),
        ("models.py", "return z + x", "return z + x + 1", (True, False)),
        ("models.py", "", "print(1)\n", (True, False)),  # what a module does when it is imported
        ("deeper.py", "x = 1", "x = 2", (True, False)),
        ("findings/stages.py", "WIDTH = 3", "WIDTH = 4", (True, False)),
        ("engine/scans.py", "return x", "return -x", (False, True)),  # by a name resolved on first use
        ("lazily.py", "y = 1", "y = 2", (False, True)),
        ("findings/stages.py", "return rank(lazily.y)", "return rank(2)", (False, True)),
        ("findings/stages.py", "widen(1)", "globals()['widen'](1)", (True, False)),
    ],
)
def test_a_stage_depends_on_the_code_it_reaches_and_on_no_other(edited, name, old, new, changes):
    root, edit = edited
    for path, text in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)

    def digests():
        return [source_digest(f"influence_kit.findings.stages:{stage}") for stage in ("train", "score")]

    before = edit(digests)
    assert tuple(a != b for a, b in zip(before, edit(digests, name, old, new))) == changes


CELLS = {
    path.stem[:2]: [
        "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
}
FUNCTIONS = {
    "train": "influence_kit.findings.common:train",
    "scan": "influence_kit.findings.common:influence",
    "bank": "influence_kit.findings.is_ekfac_right:bank",
    "Atlas": "influence_kit.corpora.worlds.atlas:make",
    "Ladder": "influence_kit.corpora.worlds.ladder:make",
}


def everything():
    stages = {name: source_digest(function) for name, function in FUNCTIONS.items()}
    return stages | {chapter: cells_digest(cells) for chapter, cells in CELLS.items()}


EDITS = {
    "what words look like to a reader": ("corpora/tokens.py", set(), {"train", "scan", "bank", "Atlas", "Ladder"}),
    "the engine": ("engine/directions.py", {"scan"}, {"train", "bank", "Atlas", "Ladder"}),
    "README": ("publishing/readme.py", set(), {*FUNCTIONS, *CELLS}),
    "the plan": ("publishing/costs.py", set(), {*FUNCTIONS, *CELLS}),
    "a chapter's measure": ("findings/memorisation.py", {"08"}, {*FUNCTIONS, *CELLS} - {"08"}),
    "a measure of many": ("measures/intervals.py", {"04", "05", "08"}, set(FUNCTIONS)),
    "how models are trained": ("models.py", {"train", "bank"}, {"Atlas", "Ladder"}),
    "a world": ("corpora/worlds/atlas.py", {"Atlas"}, {"train", "scan", "bank", "Ladder"}),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_voids_what_it_reaches_and_no_more(edited, name):
    root, edit = edited
    file, voided, valid = EDITS[name]
    shutil.copytree(ROOT / "influence_kit", root, ignore=shutil.ignore_patterns("__pycache__"))
    before = edit(everything)
    path = root / file
    # Every function of the file does one thing more.
    text = path.read_text().replace("\n    return ", "\n    _ = 1\n    return ")
    assert text != path.read_text()
    path.write_text(text)
    after = edit(everything)
    changed = {key for key in before if before[key] != after[key]}
    assert voided <= changed and not changed & valid, sorted(changed)


def test_an_unknown_function_is_refused_when_it_is_named():
    with pytest.raises(AttributeError, match="no function 'nothing'"):
        source_digest("tests.runner.tiny_stages:nothing")
