"""Shared by all tests: the helpers in `support/`, one thread per worker, the optional folder of models and text."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["LINEARIZE_CACHE"] = tempfile.mkdtemp(prefix="linearize-tests-")  # teachers' texts; removed at the end

from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))  # `from models import tiny`

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    """What teachers write in the tests does not go to the user's cache."""
    yield
    shutil.rmtree(os.environ["LINEARIZE_CACHE"], ignore_errors=True)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> str:
    """Where kernels run: in Triton's interpreter, and on a GPU; without one that half skips and says so."""
    device: str = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device (make gpu-test)")
    return device


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `../shared` beside the project (real teachers and text); the test skips where there is none."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the optional folder {path}")
    return path
