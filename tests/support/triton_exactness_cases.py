"""The kernels' part of `test_exactness.py`, run by it as `triton_cases.py` says: prints the benchmark's JSON."""

from __future__ import annotations

import sys

from benchmarks.exactness import main
from kernel_device import DEVICE
from triton_cases import quicken

if __name__ == "__main__":
    quicken()
    main(["--only-kernels", "--device", DEVICE, "--threads", "1", *sys.argv[1:]])
