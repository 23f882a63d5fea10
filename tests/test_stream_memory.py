"""A streamed conversion has a block in memory, not the model: measured in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.stream_memory import write_teacher

RUN = """
import json, sys
from pathlib import Path
import linearize
import linearize.conversion.outputs as papers
from linearize.memory import resident_bytes
papers.plot_stages = papers.plot_layer_error = lambda *_: None
import torch, transformers
torch.nn.Linear(64, 64)(torch.randn(3, 64)).sum().backward()
before = resident_bytes()
folder = Path(sys.argv[1])
overrides = {"data.length": 32, "data.max_heldout_tokens": 64, "stages.0.tokens": 64, "stages.0.batch": 1,
             "stages.0.block": 1, "stages.1.tokens": 0, "plan.mixer.feature_dim": 8, "plan.mixer.window": 8}
given = {"data": [folder / "text.txt"], "out": folder / "out", "overrides": overrides, "device": "cpu"}
assert linearize.convert(folder / "teacher", stream=True, **given) is None
peak = next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l)
print(json.dumps({"before": before, "peak": peak}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak of a process is read from /proc")
def test_memory_is_that_of_a_block(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4}
    size = write_teacher(tmp_path / "teacher", 24, **sizes)
    (tmp_path / "text.txt").write_text("\n\n".join(f"Document {i}: a quick brown fox." for i in range(40)))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", RUN, str(tmp_path)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert size > 200_000_000
    assert result["peak"] - result["before"] < 0.5 * size, result
