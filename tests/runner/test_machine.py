"""The machine: memory is kept within a stage and given back between stages."""

import gc
import platform
import subprocess
import sys
import weakref

import pytest

from influence_kit.runner import machine


@pytest.mark.parametrize("much", [True, False])
def test_what_refers_to_itself_is_released_where_much_was_held(much, monkeypatch):
    class Model:
        pass

    model = Model()
    model.own, left = model, weakref.ref(model)
    monkeypatch.setattr(machine, "peak_memory", lambda: machine.RELEASED if much else machine.RELEASED - 1)
    gc.disable()
    try:
        del model
        assert left() is not None
        machine.release_memory()
        assert (left() is None) == much
    finally:
        gc.enable()


FREED_AND_ASKED_FOR = """
import ctypes, resource, sys
from influence_kit.runner.machine import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def step():
    pieces = [libc.malloc(size) for size in (10_000_000, 20_000_000, 30_000_000)]
    for piece in pieces:
        ctypes.memset(piece, 1, 10_000_000)
    for piece in pieces:
        libc.free(piece)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library decides for itself what it keeps")
def test_freed_memory_is_kept_for_what_is_asked_for_next():
    def faults(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", FREED_AND_ASKED_FOR, how], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert faults("as it comes") > 10 * faults("keep")  # with huge pages both are few
