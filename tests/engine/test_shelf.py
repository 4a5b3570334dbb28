"""Freed memory goes back to the system. What the shelf keeps, and where, is tested with what fills it."""

import os
import platform
from pathlib import Path

import pytest
import torch

from influence_kit.engine.shelf import release_freed


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to give freed memory back")
def test_freed_memory_goes_back_to_the_system():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    release_freed()
    before = resident()
    blocks = [torch.ones(1 << 13) for _ in range(1 << 12)]  # of 32 kB, too small for pages of their own
    last = torch.ones(1 << 13)  # the heap cannot shrink below it unasked
    full = resident()
    assert full - before > 1e8
    del blocks
    release_freed()
    assert resident() - before < 0.2 * (full - before) and bool((last == 1).all())
