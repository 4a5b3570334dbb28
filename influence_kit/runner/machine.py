"""What the machine offers (cores, memory, disk) and what a process takes of it."""

import ctypes
import errno
import gc
import importlib
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from influence_kit.files import free_disk

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
RELEASED = 2_000_000_000  # bytes: what held less is not worth the time that collecting takes
MALLOPT = {-3: 1 << 25, -1: (1 << 31) - 1}  # glibc's M_MMAP_THRESHOLD, the most it takes, and M_TRIM_THRESHOLD: bytes


def repository() -> Path | None:
    """The checkout that this package is part of, or None where it was installed without one."""
    folder = Path(__file__).resolve().parents[2]
    return folder if (folder / "pyproject.toml").is_file() else None


def cache_root() -> Path:
    """INFLUENCE_KIT_CACHE; else `.cache/influence_kit` of the checkout the package runs from; else the user's cache."""
    if chosen := os.environ.get("INFLUENCE_KIT_CACHE"):
        return Path(chosen).expanduser().absolute()
    if checkout := repository():
        return checkout / ".cache" / "influence_kit"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "influence_kit"


def say(message: str) -> None:
    """One line for the person at the terminal; never into a notebook's outputs, where it would differ between runs."""
    print(message, file=sys.__stderr__, flush=True)


def _limits(name: str) -> list[str]:
    """The words of a control-group file, in either generation's place; [] where there is none."""
    for path in (Path("/sys/fs/cgroup", name), Path("/sys/fs/cgroup/memory", name)):
        try:
            return path.read_text().split()
        except OSError:
            continue
    return []


def cores() -> int:
    """Processors this process may use: its affinity, within its container's quota; at least 1."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _limits("cpu.max")
    if len(quota) == 2 and quota[0] != "max":
        available = min(available, max(1, int(quota[0]) // int(quota[1])))
    return max(1, available)


def gpus() -> list[str]:
    """Names of the GPUs that torch finds here, as a profile's `device` gives them: cuda (the first), cuda:0, cuda:1 …"""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cuda", *(f"cuda:{place}" for place in range(count))] if count else []


def total_memory() -> int:
    """Bytes of memory of the machine, or of the container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [words[0] for name in ("memory.max", "memory.limit_in_bytes") if (words := _limits(name))]
    return min([total, *(int(limit) for limit in limits if limit != "max")])


def free_memory() -> int:
    """Bytes of memory that new processes can take (Linux); elsewhere the total."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = total_memory()
    used = _limits("memory.current") or _limits("memory.usage_in_bytes")
    return min(free, total_memory() - int(used[0])) if used and total_memory() > int(used[0]) else free


def storage_problem(error: BaseException | None, name: str) -> str:
    """One line with the remedy when an error comes from a full, unwritable or misused cache folder, else ""; name: of the stage."""
    folder = cache_root()
    while error is not None:
        code, text = getattr(error, "errno", None), str(error).lower()
        where = getattr(error, "filename", None)
        where = where if isinstance(where, str) else ""
        ours = not where or where.startswith(str(folder))
        # Libraries that write by themselves tell it in words alone.
        if code in (errno.ENOSPC, errno.EDQUOT) or "no space left" in text or "os error 28" in text:
            full, remedy = (folder, " or set INFLUENCE_KIT_CACHE to a folder on a larger disk")
            if not ours:
                full, remedy = Path(where).parent, ""
            return (
                f"no space left in {full} ({free_disk(full) / 1e9:.1f} GB free) while making {name}: free some there{remedy}, "
                "then run again (finished stages are kept)"
            )
        if where and ours and code in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            return f"{where} is in the way of {name} ({os.strerror(code)}): move it away, then run again"
        if where and ours and code in (errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO):
            return (
                f"cannot write to {where} ({os.strerror(code)}) while making {name}: mend that or set INFLUENCE_KIT_CACHE to a "
                "folder that can be written, then run again (finished stages are kept)"
            )
        error = error.__cause__ or error.__context__
    return ""


def release_memory() -> None:
    """Let the system have what earlier work is done with, where that had more than RELEASED bytes at once: models, which refer to
    themselves, and what glibc keeps of what was freed. With torch loaded this takes a third of a second."""
    if peak_memory() < RELEASED:
        return
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None:
        trim(0)


def keep_memory() -> None:
    """Let glibc keep what is freed, but for the largest pieces, for what is asked for next. A training step frees and asks for some
    50 MB; as it comes, glibc returns them to the system and has them zeroed page by page every time, a tenth to a fifth of a
    small model's step. `release_memory` returns them still."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None:
        for name, value in MALLOPT.items():
            mallopt(name, value)


def reset_peak_memory() -> None:
    """Let `peak_memory` count from now on, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is then that of the whole process
        pass


def peak_memory() -> int:
    """The process's largest resident size in bytes since `reset_peak_memory` (Linux) or since its start."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def threads(count: int, with_torch: bool = False) -> Iterator[None]:
    """Compute with exactly `count` threads: the order of sums, and so the last bit, depends on it.

    What is loaded already is told; what is loaded inside reads the environment. `with_torch` loads torch beforehand.
    """
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(count)))
    torch = importlib.import_module("torch") if with_torch else sys.modules.get("torch")
    usual = torch.get_num_threads() if torch else cores()
    # Here, because `doctor` reads this module before anything is installed.
    from threadpoolctl import threadpool_limits

    try:
        with threadpool_limits(count):
            if torch:
                torch.set_num_threads(count)
            yield
    finally:
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(usual)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@cache
def commit() -> str | None:
    """The checkout's commit, with "+changes" when it holds more than that; None outside a git checkout."""
    folder = repository()
    if folder is None:
        return None

    def git(*words: str) -> str:
        answer = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
        return answer.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def circumstances() -> dict:
    """Where something was made: never part of a fingerprint, kept for `provenance.json`."""
    return {"peak_memory_bytes": peak_memory(), "host": platform.node(), "commit": commit()}
