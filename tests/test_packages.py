"""Packages made in the test, and a package archive of its own in a folder: the real apt-get runs without a network."""

import hashlib
import importlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pyarrow
import pytest

from influence_kit import packages as debian
from influence_kit.errors import UserError

needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None, reason="this machine has no apt-get")


def make_deb(path: Path, name: str, version: str, files: dict[str, bytes], compression: str = "xz") -> Path:
    """A .deb by hand (deb(5)): an ar archive of debian-binary, control.tar.*, data.tar.*."""

    def tar(entries: dict[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=f"w:{compression}" if compression in ("xz", "gz") else "w") as archive:
            folder = tarfile.TarInfo("./usr")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for entry, content in entries.items():
                info = tarfile.TarInfo(f"./{entry}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        if compression != "zst":
            return buffer.getvalue()
        packed = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
            stream.write(buffer.getvalue())
        return packed.getvalue().to_pybytes()

    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: Nobody\nDescription: invented\n"
    content = b"!<arch>\n"
    for member, data in (
        ("debian-binary", b"2.0\n"),
        (f"control.tar.{compression}", tar({"control": control.encode()})),
        (f"data.tar.{compression}", tar(files)),
    ):
        content += f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data
        content += b"\n" * (len(data) % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def open_folder():
    """A folder that other users may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def archive(open_folder, monkeypatch) -> Path:
    """A package archive with `tiny-words` 2:1.5-1, the only one apt knows; the system's package lists are empty."""
    folder = open_folder / "archive"
    publish(folder, {"usr/share/words.txt": b"amber kettle"})
    use_sources(open_folder, monkeypatch, f"deb [trusted=yes] file:{folder} ./\n")
    return folder


def publish(folder: Path, files: dict[str, bytes]) -> None:
    deb = make_deb(folder / "tiny.deb", "tiny-words", "2:1.5-1", files)
    control = "\n".join(f"{key}: {value}" for key, value in debian.control(deb).items())
    (folder / "Packages").write_text(
        f"{control}\nFilename: ./tiny.deb\nSize: {deb.stat().st_size}\n"
        f"SHA256: {hashlib.sha256(deb.read_bytes()).hexdigest()}\n"
    )


def use_sources(tmp_path: Path, monkeypatch, sources: str) -> None:
    (tmp_path / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (tmp_path / "sources.list").write_text(sources)
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{tmp_path}/sources.list";\nDir::Etc::sourceparts "-";\n'
        f'Dir::State::lists "{tmp_path}/lists";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("compression", ["xz", "gz", "zst"])
def test_members_and_version_need_no_program(tmp_path, monkeypatch, compression):
    monkeypatch.setenv("PATH", "")
    files = {"usr/a.txt": b"one", "usr/b.html": b"two", "usr/c.txt": b""}
    deb = make_deb(tmp_path / "x_1_all.deb", "x", "3:1.0~rc1-2", files, compression)
    assert debian.version(deb) == "3:1.0~rc1-2"
    assert dict(debian.members(deb)) == files
    assert list(debian.members(deb, ".txt")) == [("usr/a.txt", b"one"), ("usr/c.txt", b"")]
    assert [name for name, _ in debian.members(deb, (".html", "c.txt"))] == ["usr/b.html", "usr/c.txt"]


@pytest.mark.parametrize("compression", ["xz", "gz", "zst"])
def test_a_damaged_package_is_named(tmp_path, compression):
    deb = make_deb(tmp_path / "x_1_all.deb", "x", "1", {"usr/a.txt": os.urandom(20_000)}, compression)
    whole = deb.read_bytes()
    deb.write_bytes(whole[:-6_000])
    with pytest.raises(UserError, match="not a readable Debian package") as error:
        dict(debian.members(deb))
    assert str(deb) in one_line(error)
    middle = len(whole) - 9_000
    deb.write_bytes(
        whole[:middle] + bytes(byte ^ 0x5A for byte in whole[middle : middle + 400]) + whole[middle + 400 :]
    )
    if compression == "xz":  # the others carry no check of what lies in the middle
        with pytest.raises(UserError, match="remove it and fetch it again"):
            dict(debian.members(deb))
    deb.write_bytes(b"not a package")
    with pytest.raises(UserError, match="not a readable Debian package"):
        debian.version(deb)
    with pytest.raises(UserError, match="no such package file"):
        debian.version(tmp_path / "absent.deb")


def test_find_takes_the_newest_by_debian_order(tmp_path):
    for number, version in enumerate(["1.9-1", "1.10-1", "1.10~rc1-1"]):
        make_deb(tmp_path / f"x_{number}_all.deb", "x", version, {})
    make_deb(tmp_path / "x-more_9_all.deb", "x-more", "9", {})
    assert debian.version(debian.find("x", tmp_path)) == "1.10-1"
    assert debian.find("y", tmp_path) is None


def test_packages_that_lie_there_are_used_without_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    deb = make_deb(tmp_path / "xy_1_all.deb", "xy", "1", {})
    assert debian.fetch(["xy"], tmp_path) == [deb]


def test_without_apt_the_remedies_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get" in debian.available()
    with pytest.raises(UserError, match="apt-get is not on this machine") as error:
        debian.fetch(["some-words"], tmp_path / "debs")
    message = one_line(error)
    assert "some-words_*.deb" in message and "'debs'" in message and "--without-real-text" in message


@pytest.mark.parametrize("name", ["-o", "Upper", "a b", "../up", ""])
def test_a_name_that_could_be_an_option_or_a_path_never_reaches_apt(tmp_path, name):
    with pytest.raises(UserError, match="not a Debian package name"):
        debian.fetch([name], tmp_path)


@needs_apt
def test_fetch_with_empty_lists(tmp_path, open_folder, archive):
    assert debian.available() is None
    folder = tmp_path / "debs"
    [deb] = debian.fetch(["tiny-words"], folder)
    assert debian.version(deb) == "2:1.5-1" and dict(debian.members(deb)) == {"usr/share/words.txt": b"amber kettle"}
    assert os.listdir(folder) == [deb.name], "lists and partial downloads must be gone"
    assert not list((open_folder / "lists").glob("*Packages*")), "the system's lists must stay as they were"
    shutil.rmtree(archive)
    assert debian.fetch(["tiny-words"], folder) == [deb]


@needs_apt
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_fetch_without_root(open_folder, archive):
    for module in ("arfile", "deb822", "debian_support"):  # that user may not be able to read the environment's files
        importlib.import_module(f"debian.{module}")
    folder = open_folder / "debs"
    open_folder.chmod(0o777)
    child = os.fork()
    if child == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            os._exit(0 if [deb.stat().st_uid for deb in debian.fetch(["tiny-words"], folder)] == [65534] else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [path.name for path in folder.iterdir()] == ["tiny-words_2%3a1.5-1_all.deb"]


@needs_apt
def test_an_unknown_package_is_told_from_a_dead_network(tmp_path, archive, monkeypatch):
    with pytest.raises(UserError, match="no package tiny-sentences") as error:
        debian.fetch(["tiny-words", "tiny-sentences"], tmp_path / "debs")
    assert "tiny-sentences_*.deb" in one_line(error)
    assert os.listdir(tmp_path / "debs") == []

    use_sources(tmp_path, monkeypatch, "deb [trusted=yes] http://127.0.0.1:9/ ./\n")
    with pytest.raises(UserError, match=r"no package archive answered apt-get \(W: Failed to fetch") as error:
        debian.fetch(["tiny-words"], tmp_path / "debs")
    assert "127.0.0.1" in one_line(error) and "--without-real-text" in one_line(error)

    use_sources(tmp_path, monkeypatch, "")
    assert "no package archive configured" in debian.available()
    with pytest.raises(UserError, match="no package archive configured"):
        debian.fetch(["tiny-words"], tmp_path / "debs")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield small
    subprocess.run(["umount", str(small)], check=True)


@needs_apt
def test_a_full_disk_is_named(archive, small_disk):
    with pytest.raises(UserError, match="MB needed for package lists") as error:
        debian.fetch(["tiny-words"], small_disk)
    assert str(small_disk) in one_line(error) and "INFLUENCE_KIT_CACHE" in one_line(error)

    publish(archive, {"usr/big": os.urandom(2_000_000)})
    subprocess.run(
        ["apt-get", "update"], check=True, capture_output=True
    )  # with lists at hand it comes to the download
    with pytest.raises(UserError, match=r"no space left|arrived incomplete") as error:
        debian.fetch(["tiny-words"], small_disk)
    assert str(small_disk) in one_line(error) and "INFLUENCE_KIT_CACHE" in one_line(error)
    assert os.listdir(small_disk) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set INFLUENCE_KIT_CACHE") as error:
        debian.fetch(["xy"], tmp_path / "file")
    assert str(tmp_path / "file") in one_line(error)
