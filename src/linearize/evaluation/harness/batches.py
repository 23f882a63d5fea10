"""How many rows at a time: what a GPU holds, by trial; on a CPU by the sizes of the model."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from linearize.evaluation.context import EvalModel

CPU_BYTES = 1 << 29  # for the logits of a batch and what is computed from them
CPU_ROWS = 16  # more rows bring nothing there: they only add padding
LONGEST = 4096  # tokens: prompts of tasks are not longer, even where the model's rows could be


def choose_batch(eval_models: tuple[EvalModel, ...], max_length: int) -> int:
    """Rows of `max_length` tokens (4,096 at most) that every model can take; the same number for all."""
    return min(_batch(eval_model, min(max_length, LONGEST)) for eval_model in eval_models)


def _batch(eval_model: EvalModel, max_length: int) -> int:
    if eval_model.model.device.type != "cpu":
        return _by_trial(eval_model, max_length)
    config: Any = eval_model.model.config.get_text_config()
    row = 4 * max_length * (3 * config.vocab_size + 16 * config.hidden_size)
    rows = max(1, min(CPU_ROWS, CPU_BYTES // row))
    return 1 << (rows.bit_length() - 1)


def _by_trial(eval_model: EvalModel, max_length: int) -> int:
    """lm-eval's own search for the largest batch."""
    from linearize.evaluation.harness.model import Pairs, harness_model

    model = harness_model(eval_model, batch=1, max_length=max_length, pairs=Pairs())
    with contextlib.redirect_stdout(io.StringIO()):
        return int(model._detect_batch_size())
