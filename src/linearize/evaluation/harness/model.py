"""A model as lm-eval's `HFLM`, and how many rows it can take at a time."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Sequence
from typing import Any

from linearize.evaluation.context import EvalModel
from linearize.evaluation.harness.isolation import isolated

CPU_BYTES = 1 << 29  # for the logits of a batch and what is computed from them
CPU_ROWS = 16  # more rows bring nothing there: they only add padding
LONGEST = 4096  # tokens: prompts of tasks are not longer, even where the model's rows could be


class TooLongError(Exception):
    """An answer of a task has more tokens than a row, which lm-eval does not take; `tokens`: of the longest."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"an answer has {tokens} tokens")
        self.tokens = tokens


def harness_model(eval_model: EvalModel, *, batch: int, max_length: int) -> Any:
    """Return the model as lm-eval's `HFLM`. It raises TooLongError for an answer longer than `max_length` tokens."""
    from lm_eval.models.huggingface import HFLM

    class HarnessModel(HFLM):
        def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
            longest = max((len(continuation) for _, _, continuation in requests), default=0)
            if longest > self.max_length:
                raise TooLongError(longest)
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **options)
            return answers

    with isolated():
        return HarnessModel(
            pretrained=eval_model.model,
            tokenizer=copy.deepcopy(eval_model.tokenizer),  # lm-eval gives it a padding token
            batch_size=batch,
            max_length=max_length,
        )


def longest_row(eval_models: Sequence[EvalModel]) -> int:
    """Tokens that every model can take, found as lm-eval does for a model alone."""
    from lm_eval.models.utils import resolve_max_length

    return int(min(resolve_max_length(c.model.config, c.tokenizer, default=2048) for c in eval_models))


def choose_batch(eval_models: Sequence[EvalModel], max_length: int) -> int:
    """Rows of `max_length` tokens (4,096 at most) that every model can take; the same number for all."""
    return min(_batch(eval_model, min(max_length, LONGEST)) for eval_model in eval_models)


def _batch(eval_model: EvalModel, max_length: int) -> int:
    if eval_model.model.device.type != "cpu":  # lm-eval's own search for the largest batch
        model = harness_model(eval_model, batch=1, max_length=max_length)
        with contextlib.redirect_stdout(io.StringIO()):
            return int(model._detect_batch_size())
    config: Any = eval_model.model.config.get_text_config()
    row = 4 * max_length * (3 * config.vocab_size + 16 * config.hidden_size)
    rows = max(1, min(CPU_ROWS, CPU_BYTES // row))
    return 1 << (rows.bit_length() - 1)
