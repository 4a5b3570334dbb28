"""What this machine has and lacks, each line with its remedy. Standard library alone: it must run before installation."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from influence_kit.files import free_disk
from influence_kit.runner.machine import cache_root, cores, repository, total_memory

EXTRAS = ("notebooks", "test")
# The laptop profile on two processes.
DISK_GB, MEMORY_GB, CORES = 5.0, 6.0, 2


class Finding(NamedTuple):
    """One line: whether all is well, what was found, and what to do if it is not."""

    ok: bool
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'warn'}  {self.text}" + (f": {self.remedy}" if not self.ok else "")


def plain(name: str) -> str:
    """A distribution's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(project: dict, extras: Iterable[str] = EXTRAS) -> list[str]:
    """Names of the distributions that a pyproject's `project` table asks for, itself and by these extras."""
    listed = [*project["dependencies"]]
    for extra in extras:
        listed += project["optional-dependencies"][extra]
    return sorted({plain(re.split(r"[\s\[<>=!~;]", line, maxsplit=1)[0]) for line in listed})


def read_pins(constraints: Path) -> dict[str, str]:
    """Exact versions by plain name, from lines `name==version`."""
    lines = (line.split("#")[0].strip() for line in constraints.read_text().splitlines())
    return {plain(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def unmet(root: Path, extras: Iterable[str] = EXTRAS) -> list[str]:
    """What the running Python lacks of the project's direct requirements at their pinned versions; [] if nothing.

    A local suffix of an installed version (2.13.0+cpu) does not matter, as for pip.
    """
    import tomllib

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    pins = read_pins(root / "constraints.txt")
    missing = []
    low, high = re.findall(r"(\d+)\.(\d+)", project["requires-python"])
    if not tuple(map(int, low)) <= sys.version_info[:2] < tuple(map(int, high)):
        missing.append(f"python {project['requires-python']} (this is {sys.version_info[0]}.{sys.version_info[1]})")
    for name in requirements(project, extras):
        try:
            installed = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            installed = "absent"
        if installed != pins.get(name, installed) or installed == "absent":
            missing.append(f"{name}=={pins.get(name, '*')} (is {installed})")
    return missing


def _python(root: Path | None) -> Finding:
    version = sys.version.split()[0]
    if root is None:
        return Finding(True, f"python {version}")
    return Finding((3, 11) <= sys.version_info[:2] < (3, 14), f"python {version}", "install Python 3.11, 3.12 or 3.13")


def _packages(root: Path | None) -> Finding:
    if root is None or not (root / "constraints.txt").is_file():
        return Finding(True, "packages: no constraints.txt to compare with (installed without a checkout)")
    try:
        missing = unmet(root)
    except ImportError:
        return Finding(False, "packages: this Python is too old to look", "install Python 3.11, 3.12 or 3.13")
    remedy = "./run_all.sh installs the pinned versions into an environment of its own"
    return Finding(not missing, f"packages: {', '.join(missing) or 'all as pinned in constraints.txt'}", remedy)


def _machine() -> Iterator[Finding]:
    root = cache_root()
    free = free_disk(root) / 1e9
    yield Finding(
        free >= DISK_GB,
        f"disk: {free:.1f} GB free for {root}",
        f"set INFLUENCE_KIT_CACHE where {DISK_GB:.0f} GB are free",
    )
    existing = next(path for path in (root, *root.parents) if path.exists())
    yield Finding(
        os.access(existing, os.W_OK), f"cache folder {root}", f"make {existing} writable or set INFLUENCE_KIT_CACHE"
    )
    memory = total_memory() / 1e9
    yield Finding(memory >= MEMORY_GB, f"memory: {memory:.1f} GB", "run with --jobs 1, or --profile smoke")
    yield Finding(cores() >= CORES, f"cores: {cores()}", "expect about twice the time the README states")


def _fonts() -> Finding:
    remedy = "install a font with Chinese and Hangul (fonts-noto-cjk or fonts-wqy-microhei), or name a file in INFLUENCE_KIT_FONT"
    try:
        fonts = importlib.import_module("influence_kit.reading.fonts")
        paths = importlib.import_module("matplotlib.font_manager").findSystemFonts()
    except ImportError as error:
        return Finding(False, f"fonts: not looked for ({error})", "./run_all.sh installs what is missing")
    paths = [path for path in (os.environ.get("INFLUENCE_KIT_FONT"), *paths) if path]
    probes = {script: set(map(ord, probe)) for script, probe in fonts.PROBES.items() if script != "Japanese"}
    for path in paths:
        covered = fonts.coverage(path)
        probes = {script: points for script, points in probes.items() if not points <= covered}
        if not probes:
            return Finding(True, "fonts: Chinese and Korean can be drawn")
    return Finding(False, f"fonts: none for {' and '.join(probes)}; figures fetch one with apt if they can", remedy)


def _apt() -> Finding:
    remedy = "use a Debian or Ubuntu machine or container for the real text, or run with --without-real-text"
    if not shutil.which("apt-get"):
        return Finding(False, "apt: not here", remedy)
    try:
        shown = subprocess.run(["apt-cache", "show", "libreoffice-help-de"], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return Finding(False, "apt: apt-cache does not answer", remedy)
    update = "run `apt-get update` as root (or see its error), then look again"
    return Finding(
        shown.returncode == 0,
        "apt: real text's packages are" + ("" if shown.returncode == 0 else " not") + " listed",
        update,
    )


def _gpu() -> Finding:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return Finding(True, "gpu: not looked for (torch is not installed)")
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        return Finding(True, f"gpu: {torch.cuda.get_device_name(0)}, {memory:.0f} GB")
    if shutil.which("nvidia-smi"):
        return Finding(False, "gpu: present, but this torch cannot use it", "install a CUDA build of the pinned torch")
    return Finding(True, "gpu: none (only --profile gpu asks for one)")


def findings() -> Iterator[Finding]:
    """Every check in turn; one that fails by itself is a warning, not the end."""
    root = repository()
    yield from (_python(root), _packages(root))
    yield from _machine()
    checks: tuple[Callable[[], Finding], ...] = (_fonts, _apt, _gpu)
    for check in checks:
        try:
            yield check()
        except Exception as error:  # a doctor that dies of the disease helps nobody
            yield Finding(
                False, f"{check.__name__.strip('_')}: could not be checked", f"{type(error).__name__}: {error}"
            )


def main(arguments: list[str]) -> int:
    """Print the findings; with `--pins` print nothing and exit 0 only if the environment is the pinned one."""
    if arguments == ["--pins"]:
        root = repository()
        return 1 if root is None or unmet(root) else 0
    if arguments:
        print(f"error: doctor takes no arguments, not {' '.join(arguments)}", file=sys.stderr)
        return 2
    for finding in findings():
        print(finding, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
