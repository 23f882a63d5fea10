"""lm-eval called without side effects: no log, bars or prints, no processes, no seeding of the global generators."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

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
