"""The engine is a folder that can be copied out, under any name, to where torch, numpy, scipy, safetensors and threadpoolctl are."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
ENGINE = HERE.parents[1] / "influence_kit" / "engine"
OWN = ("test_plain.py", "test_codes.py", "test_blas.py")  # tests that need the engine alone
ALONE = ("torch", "numpy", "scipy", "safetensors", "threadpoolctl")


def needed(*names: str) -> set[str]:
    """These distributions and all that they need themselves."""
    found, to_do = set(), [canonicalize_name(name) for name in names]
    while to_do:
        if (name := to_do.pop()) not in found:
            found.add(name)
            asked = [Requirement(line) for line in requires(name) or []]
            to_do += [canonicalize_name(r.name) for r in asked if not r.marker or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture
def alone(tmp_path):
    """Returns a function that runs Python in a folder with nothing but the copy, where nothing else can be imported."""
    shutil.copytree(ENGINE, tmp_path / "carried", ignore=shutil.ignore_patterns("__pycache__"))
    allowed = needed(*ALONE, "pytest")
    refused = {
        top
        for top, owners in packages_distributions().items()
        if not allowed & {canonicalize_name(owner) for owner in owners}
    }
    assert {"influence_kit", "transformers", "datasets", "pandas", "pyarrow", "accelerate"} <= refused
    (tmp_path / "refusing.py").write_text(
        f"""import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(refused)!r}:
            raise ModuleNotFoundError(f"the engine alone must not import {{name}}", name=name)

sys.meta_path.insert(0, Refusing())
"""
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(tmp_path)}

    def run(*arguments: str) -> str:
        ran = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
        return ran.stdout

    return run


def test_the_copy_imports_and_offers_what_the_kit_offers(alone):
    modules = sorted(path.stem for path in ENGINE.glob("*.py") if path.stem != "__init__")
    offered = alone(
        "-c",
        "import refusing, importlib, carried\n"
        f"for name in {modules!r}: importlib.import_module('carried.' + name)\n"
        "print(*(getattr(carried, name).__name__ for name in carried.__all__))",
    )
    import influence_kit

    assert {"fit_ekfac", "score"} < set(offered.split()) <= set(influence_kit.__all__)


def test_the_copy_passes_its_own_tests(alone, tmp_path):
    for name in OWN:
        text = (HERE / name).read_text()
        (tmp_path / name).write_text(re.sub(r"\binfluence_kit\.engine\b", "carried", text))
    assert " passed" in alone("-m", "pytest", "-q", "-p", "refusing", "-p", "no:cacheprovider", *OWN)
