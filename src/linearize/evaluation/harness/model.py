"""lm-eval called without side effects, on a model as its `HFLM`; and how many rows a model can take at a time."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from linearize.evaluation.context import EvalModel

CPU_BYTES = 1 << 29  # for the logits of a batch and what is computed from them
CPU_ROWS = 16  # more rows bring nothing there: they only add padding
LONGEST = 4096  # tokens: prompts of tasks are not longer, even where the model's rows could be
Progress = Callable[[int, int], None]
"""Called with the requests that are answered, and all of them."""


@contextmanager
def isolated(progress: Progress | None = None, *, allow_code: bool = False) -> Iterator[None]:
    """Run lm-eval (0.4.13) quietly, and leave the process as it was.

    `progress`: receives what lm-eval's bars over a model's requests show. `allow_code`: the metric that executes what
    models write (`code_eval` of `evaluate`) may run.
    """
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm.tqdm):
        """A bar that is not drawn."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self.requests = str(options.get("desc", "")).startswith("Running")
            self.answered = 0
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.answered += int(n or 0)
            if progress is not None and self.requests:
                progress(self.answered, self.total)

    environment = {"DISABLE_MULTIPROC": "1"} | ({"HF_ALLOW_CODE_EVAL": "1"} if allow_code else {})
    with contextlib.ExitStack() as stack:
        for module in (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface, tqdm):
            stack.enter_context(_replaced(vars(module), {"tqdm": Bar}))
        stack.enter_context(_replaced(vars(lm_eval.api.metrics), {"print": lambda *text: None}))
        stack.enter_context(_replaced(os.environ, environment))
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        stack.enter_context(_own_draws())
        if not datasets.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        yield


@contextmanager
def _replaced(names: Any, values: dict[str, Any]) -> Iterator[None]:
    before = {name: names[name] for name in values if name in names}
    names.update(values)
    try:
        yield
    finally:
        for name in values:
            del names[name]
        names.update(before)


@contextmanager
def _own_draws() -> Iterator[None]:
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


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

    return int(min(resolve_max_length(m.model.config, m.tokenizer, default=2048) for m in eval_models))


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
