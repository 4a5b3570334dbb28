"""Debian packages as a source of text: fetched with `apt-get download`, read as archives, never installed.

A `.deb` is an `ar` archive with two compressed tar archives inside (deb(5)); python-debian opens the outer one.
"""

from __future__ import annotations

import errno
import io
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from influence_kit.errors import UserError
from influence_kit.files import free_disk, sha256

PACKAGE_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
# apt-get update waits forever on a full disk instead of failing, so the space for its lists is asked for first.
LISTS_BYTES = 150_000_000
APT_SECONDS = 900
APT_OPTIONS = (
    "APT::Sandbox::User=root",  # as root apt would otherwise download as a user who may not write to the folder
    "Acquire::Languages=none",
    "Acquire::Retries=2",
    "Acquire::http::Timeout=20",
    "Acquire::https::Timeout=20",
    "Debug::NoLocking=1",
)
NO_SPACE = "No space left on device", "enough free space"


def _other_ways(packages: Sequence[str]) -> str:
    files = ", ".join(f"{package}_*.deb" for package in packages)
    return (
        f"run on Debian or Ubuntu (or in a Debian container) with a network, or put {files} into a folder and set "
        "the text source to 'debs' with that folder, or run with --without-real-text"
    )


def _disk_error(folder: Path, reason: str) -> UserError:
    return UserError(
        f"cannot write Debian packages to {folder}: {reason}; "
        "set INFLUENCE_KIT_CACHE to a folder with space that you may write to"
    )


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EEXIST,
        ):
            raise _disk_error(folder, error.strerror or str(error)) from error
        raise


def available() -> str | None:
    """None where packages can be fetched with apt, else the reason why not, in one line. Takes about a second.

    Looks for `apt-get` and for configured package archives; whether an archive answers shows only in `fetch`.
    """
    if shutil.which("apt-get") is None:
        return "apt-get is not on this machine (PATH has none)"
    # Tells what would be downloaded and does nothing; unlike `indextargets` it answers with empty lists as well.
    listed = subprocess.run(
        ["apt-get", "-o", "Debug::NoLocking=1", "update", "--print-uris"],
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C"},
        timeout=60,
    )
    if listed.returncode != 0:
        return f"apt-get does not run here: {_first_error(listed.stdout + listed.stderr)}"
    if "'" not in listed.stdout:
        return "apt-get has no package archive configured (its sources are empty)"
    return None


def find(package: str, folder: Path) -> Path | None:
    """The package's `.deb` in `folder` (`<package>_<version>_<architecture>.deb`), the newest of several, or None."""
    from debian.debian_support import Version

    found = sorted(Path(folder).glob(f"{package}_*.deb"))
    if len(found) < 2:
        return found[0] if found else None
    return max(found, key=lambda path: Version(version(path)))


def fetch(packages: Sequence[str], folder: Path, download: bool = True) -> list[Path]:
    """Packages (not their dependencies) as files in `folder`, by apt, needing no root and installing nothing.

    Packages that already lie there are used as they are. Where the system's package lists are empty, outdated or lack
    the package, lists are downloaded into a private folder inside `folder` and removed afterwards.

    Args:
        packages: Their names.
        folder: Where the files are put, or, without `download`, have to lie.
        download: Whether to fetch what is not there.

    Returns:
        The `.deb` files in the order of `packages`.

    Raises:
        UserError: apt-get absent, no network, package unknown, disk full or not writable; without `download`, packages
            that are not there.
    """
    folder = Path(folder).absolute()
    wrong = [package for package in packages if not PACKAGE_NAME.fullmatch(package)]
    if wrong:
        raise UserError(f"not a Debian package name: {wrong[0]!r}; use lower-case letters, digits, '+', '-' and '.'")
    with _disk_errors(folder):
        missing = [package for package in dict.fromkeys(packages) if find(package, folder) is None]
        if missing and not download:
            raise UserError(
                f"the folder {folder} lacks {', '.join(f'{package}_*.deb' for package in missing)}; put the files "
                "there, ask for nothing that needs them, or run with --without-real-text"
            )
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            _download(missing, folder)
    return [_found(package, folder) for package in packages]


def provenance(debs: Iterable[Path]) -> dict[str, dict[str, str]]:
    """What says exactly which packages a text was taken from: `version` and `sha256` by package."""
    about = {deb: control(deb) for deb in debs}
    return {of["Package"]: {"version": of.get("Version", ""), "sha256": sha256(deb)} for deb, of in about.items()}


def _found(package: str, folder: Path) -> Path:
    path = find(package, folder)
    if path is None:
        raise UserError(f"apt-get reported success but {folder} holds no {package}_*.deb; {_other_ways([package])}")
    return path


def _download(packages: list[str], folder: Path) -> None:
    reason = available()
    if reason is not None:
        raise UserError(f"cannot fetch {', '.join(packages)}: {reason}; {_other_ways(packages)}")
    # apt writes straight to the final name: an interrupted download must never be taken for a package later.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        arrived = Path(scratch, "arrived")
        arrived.mkdir()
        succeeded, output = _apt(["download", *packages], (), arrived, folder)
        if not succeeded:
            _download_with_private_lists(packages, Path(scratch), arrived, folder, output)
        for path in arrived.glob("*.deb"):
            if not _is_whole(path):  # copying from a local archive, apt takes no notice of a disk that fills up
                raise _disk_error(folder, f"{path.name} arrived incomplete, {free_disk(folder)} bytes free")
            os.replace(path, folder / path.name)


def _download_with_private_lists(packages: list[str], scratch: Path, arrived: Path, folder: Path, before: str) -> None:
    free = free_disk(folder)
    if free < LISTS_BYTES:
        raise _disk_error(folder, f"{free / 1e6:.0f} MB free, {LISTS_BYTES / 1e6:.0f} MB needed for package lists")
    lists, cache = scratch / "lists", scratch / "cache"
    (lists / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    private = (f"Dir::State::lists={lists}", f"Dir::Cache={cache}", "Dir::Cache::pkgcache=", "Dir::Cache::srcpkgcache=")
    _, updated = _apt(["update"], private, arrived, folder)
    succeeded, output = _apt(["download", *packages], private, arrived, folder)
    if succeeded:
        return
    # apt-get update exits with 0 even when no archive answered; what tells is whether any list arrived.
    if not list(lists.glob("*_Packages*")):
        quoted = _first_error(updated) or _first_error(before)
        raise UserError(
            f"cannot fetch {', '.join(packages)}: no package archive answered apt-get ({quoted}); "
            f"{_other_ways(packages)}"
        )
    unknown = re.findall(r"Unable to locate package (\S+)", output)
    if unknown:
        raise UserError(
            f"the configured Debian archives have no package {', '.join(unknown)}; check the name and the "
            f"apt sources, or {_other_ways(unknown)}"
        )
    raise UserError(
        f"cannot fetch {', '.join(packages)}: apt-get says '{_first_error(output)}'; {_other_ways(packages)}"
    )


def _apt(command: list[str], options: Sequence[str], working: Path, folder: Path) -> tuple[bool, str]:
    """(succeeded, output) of `apt-get command` run in the folder `working`; UserError when the disk is full."""
    arguments = [part for option in (*APT_OPTIONS, *options) for part in ("-o", option)]
    try:
        ended = subprocess.run(
            ["apt-get", "-q", *arguments, *command],
            cwd=working,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env=os.environ | {"LC_ALL": "C"},
            timeout=APT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False, f"E: apt-get {command[0]} did not end within {APT_SECONDS} seconds"
    if any(phrase in ended.stdout for phrase in NO_SPACE):
        raise _disk_error(folder, "no space left on the device")
    return ended.returncode == 0, ended.stdout


def _first_error(output: str) -> str:
    """apt's first error line, else its first warning; '' when there is neither."""
    lines = [" ".join(line.split()) for line in output.splitlines()]
    return next((line for mark in ("E:", "W:", "Err:") for line in lines if line.startswith(mark)), "")


def _is_whole(deb: Path) -> bool:
    from debian.arfile import ArError, ArFile

    try:
        return all(len(member.read()) == member.size for member in ArFile(filename=str(deb)).getmembers())
    except ArError:
        return False


@contextmanager
def _part(deb: Path, name: str) -> Iterator[tarfile.TarFile]:
    """The tar archive `data` or `control` of a package, whatever it is compressed with.

    python-debian pipes zstd (Ubuntu's choice) through the program `unzstd`, which slim containers lack, and Python
    3.11's tarfile cannot read it; Arrow's own decompressor can.
    """
    import pyarrow
    from debian.arfile import ArError, ArFile

    try:
        parts = [member for member in ArFile(filename=str(deb)).getmembers() if member.name.startswith(f"{name}.tar")]
        if not parts:
            raise ArError(f"has no {name}.tar")
        data = parts[0].read()
        if parts[0].name.endswith(".zst"):
            data = pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            yield archive
    except FileNotFoundError as error:
        raise UserError(f"no such package file: {deb}; give the path of a .deb") from error
    except (ArError, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{deb} is not a readable Debian package ({error}); remove it and fetch it again") from error


def members(deb: Path, suffixes: str | Sequence[str] = "") -> Iterator[tuple[str, bytes]]:
    """(name, content) of each regular file of the package whose name ends in one of `suffixes` (default: all).

    Names have no leading slash ("usr/share/..."); the order is the archive's. Nothing is written to disk.

    Raises:
        UserError: the file is missing or not a Debian package (xz, gz, bz2 and zstd are read).
    """
    suffixes = (suffixes,) if isinstance(suffixes, str) else tuple(suffixes)
    with _part(Path(deb), "data") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() and member.name.endswith(suffixes) else None
            if content is not None:
                yield member.name.removeprefix("./").lstrip("/"), content.read()


def control(deb: Path) -> dict[str, str]:
    """The package's control fields, for example {"Package": ..., "Version": ...}; UserError as `members`."""
    from debian.deb822 import Deb822

    with _part(Path(deb), "control") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name.removeprefix("./") == "control" else None
            if content is not None:
                return dict(Deb822(content.read()))
    raise UserError(f"{deb} is not a readable Debian package (no control file); remove it and fetch it again")


def version(deb: Path) -> str:
    """The package's version, for example "4:7.4.7-1+deb12u14"; UserError as `members`."""
    return control(deb).get("Version", "")
