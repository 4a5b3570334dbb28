"""Whoever follows README changes nothing that git tracks: each command that it shows runs in a copy of the checkout, as small as it gets."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from influence_kit.cli import NO_TEXT
from influence_kit.packages import available
from influence_kit.runner.machine import cache_root
from tests.corpora.texts.test_own import TEXTS, save_model, save_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
SHOWN = [*BLOCKS, *re.findall(r"`((?:\./run_all\.sh|python|papermill) [^`\n]+)`", TEXT)]
COMMANDS = list(dict.fromkeys(shlex.join(shlex.split(line, comments=True)) for line in SHOWN))
# The plain run of a profile writes what git tracks, and benchmarks write README where they are asked to: that is what these are for.
MEANT = re.compile(r"\./run_all\.sh( --profile \w+)?|python tests/benchmarks/.*")
# Of these a smaller part tells the same: one file of tests, no window.
SMALLER = {"test": ["tests/test_files.py"], "lab": ["--version"]}


def git(*words: str, cwd: Path) -> str:
    done = subprocess.run(["git", *words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A checkout of its own with the files as they are here, beside a model, texts and queries of the user's own."""
    home = tmp_path_factory.mktemp("reader")
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0"):
        if (ROOT / name).is_file():
            (home / "kit" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, home / "kit" / name)
    git("init", "-q", cwd=home / "kit")
    git("add", "-A", cwd=home / "kit")
    git("-c", "user.name=reader", "-c", "user.email=reader@localhost", "commit", "-qm", "all", cwd=home / "kit")
    save_model(home / "model", len(save_tokenizer(home / "model")), context=1024)
    (home / "queries").write_text("- {prompt: The harbour lies, completion: ' north.'}\n" * 2)
    (home / "texts").mkdir()
    (home / "kit" / ".cache").mkdir()  # as any run before leaves it
    (home / "texts" / "some.txt").write_text("\n\n".join(TEXTS))
    return home / "kit"


def smaller(command: str) -> list[str]:
    """The same command on the smoke profile and one seed, with a model, texts and queries that are there."""
    words = shlex.split(re.sub(r"--seeds \S+", "--seeds 101", command))
    words = [re.sub(r"^(model|texts|queries)=.*", r"\1=../\1", word) for word in words]
    given = words[1] if len(words) > 1 else ""
    if words[0] != "./run_all.sh" or given in ("doctor", "--help") or "--sequences" in words:
        return words
    return words + SMALLER.get(given, [] if "--profile" in words else ["--profile", "smoke"])


def test_readme_shows_commands_of_every_sort():
    told = " ".join(COMMANDS)
    assert all(word in told for word in ("papermill", "--only", "--seeds", "model=", "--plan", "lab", "test", "doctor"))
    assert next(command for command in COMMANDS if MEANT.fullmatch(command)) == "./run_all.sh"


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if not MEANT.fullmatch(command)], ids=str)
def test_a_command_of_readme_leaves_the_checkout_as_it_was(copy, command):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = {"PATH": path, "PYTHONPATH": str(copy), "INFLUENCE_KIT_CACHE": str(cache_root())}
    settings |= {NO_TEXT: "1"} if available() else {}
    asked = {"cwd": copy, "env": os.environ | settings, "timeout": 1200}
    done = subprocess.run(smaller(command), **asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert git("status", "--porcelain", cwd=copy) == ""
