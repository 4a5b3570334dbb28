import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from influence_kit.errors import UserError
from influence_kit.runner import plan as planning
from influence_kit.runner.machine import free_memory
from influence_kit.runner.scheduler import RunFailed, chain_seconds, clock, needed
from influence_kit.runner.stages import Cost, damage, ensure
from tests.runner.tiny_stages import STEPS, calls, cost_of, run_stages, stage

REPOSITORY = Path(__file__).parents[2]


def events() -> list[tuple[str, float]]:
    lines = Path(os.environ["TINY_CALLS"]).read_text().splitlines()
    return sorted(
        ((" ".join(line.split()[:-2]), float(line.split()[-1])) for line in lines), key=lambda event: event[1]
    )


def spans() -> dict[str, tuple[float, float]]:
    """When each `number` stage began and ended."""
    times = dict(events())
    return {
        name.split()[1]: (began, times[f"end {name.split()[1]}"])
        for name, began in events()
        if name.startswith("number")
    }


def overlap(one: tuple[float, float], two: tuple[float, float]) -> bool:
    return one[0] < two[1] and two[0] < one[1]


# --- what runs, and in which order


def test_inputs_come_first_and_finished_stages_are_left_alone():
    one, two = stage("number", value=1), stage("number", value=2)
    both = stage("total", inputs={"one": one, "two": two})
    again = stage("total", inputs={"both": both, "one": one})
    ensure(one)
    made = run_stages([again], jobs=2)
    assert [each.fingerprint for each in made] == [two.fingerprint, both.fingerprint, again.fingerprint]
    assert json.loads((again.folder / "value.json").read_text()) == 4
    assert run_stages([again, both, one], jobs=2) == []


def test_the_longest_chain_starts_first():
    def cost(seconds: float) -> Cost:
        return Cost(seconds=seconds)

    short = stage("number", value=1, cost=cost(3))
    long = stage("number", value=2, cost=cost(5))
    root = stage("number", value=3, cost=cost(1))
    leaf = stage("total", inputs={"root": root}, cost=cost(9))
    todo = needed([short, long, root, leaf])
    costs = {key: cost_of(one) for key, one in todo.items()}
    assert chain_seconds(todo, costs)[root.fingerprint] == 10
    made = run_stages([short, long, root, leaf], jobs=1)
    assert [each.fingerprint for each in made] == [each.fingerprint for each in (root, leaf, long, short)]


def test_stages_run_beside_each_other_up_to_jobs():
    run_stages([stage("number", value=value, seconds=0.6) for value in (1, 2, 3)], jobs=2)
    times = list(spans().values())
    pairs = [(a, b) for i, a in enumerate(times) for b in times[i + 1 :]]
    assert any(overlap(*pair) for pair in pairs) and not all(overlap(*pair) for pair in pairs)


def test_stages_that_would_not_fit_into_memory_together_run_one_by_one():
    big = Cost(memory_bytes=int(0.6 * free_memory()))
    run_stages([stage("number", value=value, seconds=0.4, cost=big) for value in (1, 2)], jobs=2)
    assert not overlap(*spans().values())


def test_a_gpu_is_one_stages_at_a_time_and_a_plan_adds_up_what_it_is_for():
    one, two = (stage("number", value=value, seconds=0.4, device="cuda", cost=Cost(30)) for value in (1, 2))
    free = stage("number", value=3, seconds=0.4, cost=Cost(30))
    assert planning.plan([one, two, free], cost_of, jobs=3).seconds == 60
    run_stages([one, two, free], jobs=3)
    times = spans()
    assert not overlap(times["1"], times["2"])
    assert overlap(times["3"], times["1"]) or overlap(times["3"], times["2"])


def test_force_makes_kinds_and_labels_again_wherever_they_stand():
    one = stage("number", "first", value=1)
    both = stage("total", "sum", inputs={"one": one})
    run_stages([both], jobs=1)
    assert [each.label for each in run_stages([both], jobs=1, force_kinds={"number"})] == ["first"]
    assert [each.label for each in run_stages([both], jobs=1, force_kinds={"sum"})] == ["sum"]
    assert [each.label for each in run_stages([both], jobs=1, force_kinds={"all"})] == ["first", "sum"]


def test_a_damaged_stage_is_told_and_made_again(capfd):
    one = stage("number", "first", value=1)
    run_stages([one], jobs=1)
    (one.folder / "value.json").write_text("2")
    assert run_stages([one], jobs=1) == [one]
    assert "first: value.json is not what was written" in capfd.readouterr().err
    assert (one.folder / "value.json").read_text() == "1" and damage(one) == ""


def test_workers_compute_with_one_thread():
    made = stage("surroundings")
    run_stages([made], jobs=1)
    assert set(json.loads((made.folder / "value.json").read_text()).values()) == {"1"}


# --- how a run ends


def test_a_failing_stage_names_itself_its_reason_and_its_log(capfd):
    bad = stage("fail", "Bad one")
    after = stage("total", inputs={"bad": bad})
    beside = stage("number", value=1, seconds=1.5)
    with pytest.raises(RunFailed) as caught:
        run_stages([after, beside], jobs=2)
    assert caught.value.exit_code == 1
    assert str(caught.value).startswith("stage Bad one failed: ValueError: the reason\n")
    log = Path(str(caught.value).split("log: ")[1])
    text = log.read_text()
    assert (
        log.is_relative_to(os.environ["INFLUENCE_KIT_CACHE"])
        and "what was printed before" in text
        and "Traceback" in text
    )
    # What ran beside it was allowed to finish; what needed it never began.
    assert beside.folder.is_dir() and "total" not in calls()


def test_an_error_of_the_user_stays_one():
    with pytest.raises(UserError, match="^give a smaller number than 7$"):
        run_stages([stage("refuse")], jobs=1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_worker_says_memory_and_what_to_do(jobs):
    done = stage("number", value=1)
    killed = stage("die", "Atlas 64x2 seed 1", inputs={"done": done}, cost=Cost(memory_bytes=1_200_000_000))
    others = [stage("number", value=2, seconds=1.0)]
    with pytest.raises(
        RunFailed, match="was killed .signal 9., usually out of memory; it needs about 1.2 GB"
    ) as caught:
        run_stages([killed, *others], jobs=jobs)
    assert caught.value.exit_code == 137
    assert str(caught.value).startswith("stage Atlas 64x2 seed 1 was") and "finished stages are kept" in str(
        caught.value
    )
    assert ("--jobs 1" in str(caught.value)) == (jobs > 1)
    assert done.folder.is_dir()


def test_running_out_of_memory_is_told_as_that():
    with pytest.raises(RunFailed, match="can't allocate memory.*finished stages are kept") as caught:
        run_stages([stage("starve", "Hungry")], jobs=1)
    assert caught.value.exit_code == 137


def test_a_full_disk_ends_a_run_as_the_users_to_mend():
    with pytest.raises(UserError, match="no space left in .*INFLUENCE_KIT_CACHE"):
        run_stages([stage("fill_disk")], jobs=1)


def test_a_full_disk_is_told_where_the_log_is_what_fails():
    made = stage("fill_disk", "Large thing")
    made.folder.parent.mkdir(parents=True)
    made.beside(".log").symlink_to("/dev/full")
    with pytest.raises(
        UserError, match="^no space left in .* while making Large thing: free some there or set INFLUENCE_KIT_CACHE"
    ):
        run_stages([made], jobs=1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_worker_outlives_a_killed_run_and_the_next_one_goes_on(tmp_path, monkeypatch):
    code = (
        "from tests.runner.tiny_stages import run_stages, stage\n"
        "if __name__ == '__main__':\n    run_stages([stage('slow')], jobs=2)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    slow = stage("slow")
    state = slow.beside(".part") / "resume" / "link.json"
    deadline = time.monotonic() + 30
    while not (state.exists() and json.loads(state.read_text())[0] >= 5):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker = int(Path(os.environ["TINY_CALLS"]).read_text().split()[3])
    assert alive(worker) and worker != process.pid
    process.send_signal(signal.SIGKILL)
    process.wait()
    while alive(worker):
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.02)
    run_stages([slow], jobs=1)
    assert 5 <= int(calls()[1].split()[-1]) < STEPS
    resumed = (slow.folder / "value.json").read_bytes()
    monkeypatch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path / "other"))
    run_stages([stage("slow")], jobs=1)
    assert (stage("slow").folder / "value.json").read_bytes() == resumed


def test_source_that_changed_since_the_run_began_is_not_used():
    stale = stage("number", value=1)
    stale.__dict__["fingerprint"] = "0" * 64  # as if the package had been edited between planning and work
    with pytest.raises(UserError, match="changed during the run"):
        run_stages([stale], jobs=1)


# --- what is shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_line_tells_what_runs_and_how_far():
    terminal = Terminal()
    run_stages([stage("slow", "Chain", cost=Cost(seconds=2))], jobs=1, stream=terminal)
    shown = terminal.getvalue().split("\r\x1b[K")
    assert any(line.startswith("0/1 · Chain ") and "links" in line and "left" in line for line in shown)
    assert shown[-1] == "" and all(len(line) < 300 for line in shown)


def test_without_a_terminal_each_finished_stage_is_a_line():
    stream = io.StringIO()
    run_stages([stage("number", f"stage {value}", value=value) for value in (1, 2)], jobs=1, stream=stream)
    assert [line.split(" (")[0] for line in stream.getvalue().splitlines()] == ["[1/2] stage 1", "[2/2] stage 2"]


def test_clock():
    assert [clock(seconds) for seconds in (7.4, 725, 3723)] == ["0:07", "12:05", "1:02:03"]


# --- plan and preflight


def test_the_plan_lists_states_costs_and_totals():
    done = stage("number", "done", value=1, cost=Cost(60, 10**9, 10**9))
    ensure(done)
    first = stage("total", "first", inputs={"done": done}, cost=Cost(100, 2 * 10**9, 3 * 10**8))
    second = stage("total", "second", inputs={"first": first}, cost=Cost(50, 10**9, 2 * 10**8))
    third = stage("number", "third", value=3, cost=Cost(10, 5 * 10**8, 0))
    plan = planning.plan([done, second, third], cost_of, jobs=2)
    assert [each.label for each in plan.todo.values()] == ["first", "second", "third"]
    assert plan.seconds == 150 and plan.memory_bytes == 3 * 10**9 and plan.disk_bytes == 5 * 10**8
    lines = planning.describe(plan).splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [
        ["first", "to"], ["done", "cached"], ["second", "to"], ["third", "to"],
    ]  # fmt: skip
    assert lines[-1].startswith("3 to do, 1 cached; on 2 processes about 2:30, 3.0 GB memory, 500 MB disk in ")
    assert not first.folder.exists()


def test_preflight_refuses_what_cannot_end(own_cache):
    huge = Cost(disk_bytes=10**15)
    with pytest.raises(UserError, match=r"needs about 1200000\.0 GB in .* GB free: set INFLUENCE_KIT_CACHE"):
        planning.preflight(planning.plan([stage("number", value=1, cost=huge)], cost_of))
    with pytest.raises(UserError, match="choose a smaller profile"):
        planning.preflight(planning.plan([stage("number", value=1, cost=Cost(memory_bytes=10**15))], cost_of))

    def no_network(todo) -> None:
        raise UserError(f"{len(todo)} stage wants text")

    with pytest.raises(UserError, match="1 stage wants text"):
        planning.preflight(planning.plan([stage("number", value=1)], cost_of), [no_network])
    ensure(stage("number", value=1))
    planning.preflight(
        planning.plan([stage("number", value=1)], cost_of), [no_network]
    )  # nothing to do: nothing is asked
    assert calls() == ["number 1", "end 1"]


def test_preflight_refuses_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("INFLUENCE_KIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot write to the cache folder .*set INFLUENCE_KIT_CACHE"):
        planning.preflight(planning.plan([stage("number", value=1)], cost_of))
