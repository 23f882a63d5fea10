"""Memory that is returned: pages of mapped weights, and large blocks after they are freed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from linearize.memory import MappedFiles

BLOCKS = """
import torch
from linearize.memory import return_large_blocks

def held():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096

if {wanted}:
    return_large_blocks()
before, kept = held(), []
for _ in range(20):
    whole = torch.ones(3_000_001)
    kept.append(torch.ones(100_003))
    del whole
    torch.ones(5_000_001)
print(held() - before)
"""


def resident(path: Path) -> int:
    """Bytes of a mapped file that this process holds."""
    held, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(path.name)
        elif inside and line.startswith("Rss:"):
            held += int(line.split()[1]) * 1024
    return held


@pytest.mark.skipif(sys.platform != "linux", reason="pages are asked for in Linux's way")
def test_pages_of_a_mapped_tensor_are_let_go_and_its_values_stay(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.randn(1201, 1003), "b": torch.randn(1007, 301)}, path)
    tensors = load_file(path)
    values = {name: value.clone() for name, value in tensors.items()}
    if resident(path) < tensors["a"].nbytes:
        pytest.skip("this safetensors does not map files")
    MappedFiles().let_go(tensors["a"])
    if resident(path) >= tensors["a"].nbytes:
        pytest.skip("this system keeps the pages (tmpfs, or another kernel)")
    assert resident(path) < tensors["b"].nbytes + 2**17
    own = torch.ones(1201, 1003)
    MappedFiles().let_go(own)
    assert own.sum() == own.numel()
    for name, value in values.items():
        assert torch.equal(tensors[name], value)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_blocks_leave_the_process() -> None:
    held = {}
    for fixed in (False, True):
        words = [sys.executable, "-c", BLOCKS.format(wanted=fixed)]
        done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        held[fixed] = int(done.stdout)
    kept = 20 * 100_003 * 4
    assert held[True] < kept + 4e6, held
    if held[False] < held[True] + 4e6:
        pytest.skip(f"this system's allocator gives it back by itself: {held}")
