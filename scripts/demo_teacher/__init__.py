"""The parts of `scripts/train_demo_teacher.py`: text, batches, model, training, measurements, saving."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

_SOURCE = Path(__file__).resolve().parents[2] / "src" / "linearize"

if "linearize" not in sys.modules:
    # The recall generator is plain Python: a bare package leaves out the rest of what `import linearize` needs.
    _package = ModuleType("linearize")
    _package.__path__ = [str(_SOURCE)]
    sys.modules["linearize"] = _package
