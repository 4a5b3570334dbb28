import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from influence_kit.errors import UserError
from influence_kit.runner.stages import Stage, damage, ensure, record, sha256
from tests.runner import tiny_stages
from tests.runner.tiny_stages import STEPS, calls, stage

REPOSITORY = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that a stage is for (stage.json tells when and where it was made)."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "stage.json"}


def in_a_process(code: str, **environment: str) -> subprocess.Popen:
    settings = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


# --- made once, listed, found again


def test_a_stage_is_made_once_with_its_inputs():
    one, two = stage("number", value=1), stage("number", value=2)
    both = stage("total", inputs={"one": one, "two": two})
    folder = ensure(both)
    assert json.loads((folder / "value.json").read_text()) == 3
    assert calls() == ["number 1", "end 1", "number 2", "end 2", "total"]
    assert ensure(both) == folder and len(calls()) == 5
    # Inputs are looked at only where they are needed: a made stage stands by itself.
    shutil.rmtree(one.folder)
    assert ensure(both) == folder and len(calls()) == 5


def test_stage_json_lists_every_file_with_its_hash():
    made = stage("number", "Seven", value=7)
    folder = ensure(made)
    content = record(made)
    assert folder.name == made.fingerprint[:16] and folder.parent.name == "number"
    assert content["fingerprint"] == made.fingerprint and content["label"] == "Seven"
    assert set(content["files"]) == {"value.json", "more/text.txt"}
    for name, listed in content["files"].items():
        assert listed == {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    assert content["made"]["wall_seconds"] >= 0 and content["made"]["peak_memory_bytes"] > 1e6


def test_a_cache_carried_elsewhere_is_used_there(tmp_path, monkeypatch):
    made = stage("number", value=7)
    ensure(made)
    shutil.copytree(tmp_path / "cache", tmp_path / "carried", copy_function=shutil.copyfile)
    monkeypatch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path / "carried"))
    folder = ensure(stage("number", value=7))
    assert folder.is_relative_to(tmp_path / "carried") and calls() == ["number 7", "end 7"]


def test_force_makes_again_and_keeps_the_old_files_until_then():
    made = stage("number", value=7)
    before = contents(ensure(made))
    assert contents(ensure(made, force=True)) == before
    assert calls() == ["number 7", "end 7"] * 2
    assert not made.beside(".old").exists() and not made.beside(".part").exists()


# --- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def flip_behind_the_clock(path: Path) -> None:
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("value.json", flip),
        ("more/text.txt", flip_behind_the_clock),
        ("more/text.txt", lambda path: path.write_bytes(path.read_bytes()[:10])),
        ("value.json", Path.unlink),
        ("stage.json", lambda path: path.write_bytes(path.read_bytes()[:50])),
        ("stage.json", Path.unlink),
        (
            "stage.json",
            lambda path: path.write_text(path.read_text().replace('"wall_seconds": 0', '"wall_seconds": 9')),
        ),
    ],
)
def test_damage_is_reported_in_one_line_and_made_again(name, harm, capfd):
    made = stage("number", "Seven", value=7)
    before = contents(ensure(made))
    capfd.readouterr()
    harm(made.folder / name)
    assert contents(ensure(made)) == before
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("Seven: ") and name in lines[0] and "making it again" in lines[0]
    assert calls() == ["number 7", "end 7"] * 2


def test_what_lies_in_the_way_of_a_stage_is_put_away():
    made = stage("number", "Seven", value=7)
    before = contents(ensure(made))
    for name, harm in [
        ("", Path.touch),
        (".part", Path.touch),
        (".old", Path.touch),
        (".seen", Path.mkdir),
        (".seen", Path.touch),
    ]:
        shutil.rmtree(made.folder)
        shutil.rmtree(path) if (path := made.beside(name)).is_dir() else path.unlink(missing_ok=True)
        harm(path)
        if name == ".seen":
            path.write_text("7") if path.is_file() else None
            ensure(made)
            flip(made.folder / "value.json")
        assert contents(ensure(made)) == before


@pytest.mark.parametrize("left", ["stage.json", "stage.json.part"])
def test_a_kill_while_a_stage_is_sealed_costs_nothing(left):
    made = stage("number", value=7)
    made.beside(".part").mkdir(parents=True)
    (made.beside(".part") / left).write_text('{"fingerpr')
    folder = ensure(made)
    assert damage(made) == "" and (folder / "value.json").read_text() == "7"


def test_a_folder_where_a_lock_should_be_is_named():
    made = stage("number", value=7)
    made.beside(".lock").mkdir(parents=True)
    with pytest.raises(
        UserError, match=f"{made.beside('.lock')} is in the way of number .* move it away, then run again"
    ):
        ensure(made)


def test_verify_hashes_files_whose_times_say_nothing():
    made = stage("number", value=7)
    ensure(made)
    path = made.folder / "value.json"
    flip(path)
    # Such as a disk that forgets: the note of the last check is as if the file had never changed.
    seen = json.loads(made.beside(".seen").read_text())
    status = path.stat()
    seen["value.json"] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    made.beside(".seen").write_text(json.dumps(seen))
    ensure(made)
    assert len(calls()) == 2
    ensure(made, verify=True)
    assert len(calls()) == 4


# --- kills, locks, full disks


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


ENSURE = (
    "from tests.runner.tiny_stages import stage; from influence_kit.runner.stages import ensure; ensure(stage('slow'))"
)


def test_a_killed_stage_goes_on_where_it_was_and_ends_with_the_same_bytes(tmp_path, monkeypatch):
    killed = stage("slow")
    process = in_a_process(ENSURE)
    state = killed.beside(".part") / "resume" / "link.json"
    wait_for(lambda: state.exists() and json.loads(state.read_text())[0] >= 5)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not killed.folder.exists()
    folder = ensure(killed)
    assert record(killed)["made"]["resumed"] is True
    assert calls()[0] == "slow from 0" and 5 <= int(calls()[1].split()[-1]) < STEPS
    monkeypatch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path / "other"))
    assert contents(ensure(stage("slow"))) == contents(folder)
    assert not (folder / "resume").exists()


def test_a_checkpoint_that_cannot_be_read_costs_the_work_not_the_run(capfd):
    broken = stage("slow")
    resume = broken.beside(".part") / "resume"
    resume.mkdir(parents=True)
    (resume / "link.json").write_text("[7, ")
    ensure(broken)
    assert calls() == ["slow from 0"]
    assert "could not continue after an interruption" in capfd.readouterr().err


def test_two_processes_make_one_stage_once():
    processes = [in_a_process(ENSURE) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert calls() == ["slow from 0"]
    assert sum("another process is making it" in error for error in errors) == 1


def test_a_full_disk_names_the_folder_and_the_remedy_and_costs_no_finished_stage(own_cache):
    done = stage("number", value=1)
    with pytest.raises(UserError, match="no space left in .*INFLUENCE_KIT_CACHE") as caught:
        ensure(stage("fill_disk", "Large thing", inputs={"done": done}))
    assert str(own_cache) in str(caught.value) and "Large thing" in str(caught.value)
    assert "\n" not in str(caught.value) and done.folder.is_dir()


def test_a_failing_stage_raises_its_own_error_and_leaves_no_result():
    failing = stage("fail")
    with pytest.raises(ValueError, match="the reason"):
        ensure(failing)
    assert not failing.folder.exists()


# --- fingerprints


def test_parameters_count_as_json_sees_them():
    one = Stage("k", tiny_stages.number, {"a": (1, 2), "b": 0.5})
    two = Stage("k", tiny_stages.number, {"b": 0.5, "a": [1, 2]}, label="another label")
    other = Stage("k", tiny_stages.number, {"b": 0.25, "a": [1, 2]})
    assert one.fingerprint == two.fingerprint != other.fingerprint
    with pytest.raises(ValueError):
        _ = Stage("k", tiny_stages.number, {"a": float("nan")}).fingerprint
    with pytest.raises(TypeError):
        _ = Stage("k", tiny_stages.number, {"a": Path("somewhere")}).fingerprint


def test_inputs_kind_threads_and_libraries_count():
    base = dict(kind="total", function=tiny_stages.total, libraries=())
    one, two = stage("number", value=1), stage("number", value=2)
    prints = {
        Stage(**base).fingerprint,
        Stage(**base, inputs={"a": one}).fingerprint,
        Stage(**base, inputs={"a": two}).fingerprint,
        Stage(**base, inputs={"b": one}).fingerprint,
        Stage(**base, threads=2).fingerprint,
        Stage(**base | {"libraries": ("numpy",)}).fingerprint,
        Stage(**base | {"kind": "sum"}).fingerprint,
    }
    assert len(prints) == 7


def test_no_path_host_or_process_enters_a_fingerprint(tmp_path):
    code = "from tests.runner.tiny_stages import stage; print(stage('slow', value=3).fingerprint)"
    copy = tmp_path / "elsewhere"
    ignored = shutil.ignore_patterns("__pycache__", ".git", ".cache", ".venv", "figures", "*.egg-info")
    shutil.copytree(REPOSITORY, copy, ignore=ignored)
    process = in_a_process(code, PYTHONPATH=str(copy), HOME=str(tmp_path), PYTHONHASHSEED="7")
    output, error = process.communicate()
    assert output.strip() == stage("slow", value=3).fingerprint, error
