"""One task measured on one model by lm-eval's own runner."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize.decoding.loading import is_student
from linearize.errors import InputError, one_line
from linearize.evaluation.harness.catalogue import Entry
from linearize.evaluation.harness.definitions import folder_manager, quiet, refers_outside, task_manager

BOOTSTRAP = 1000  # draws for metrics without a formula for their error (perplexity); lm-eval's command takes 100,000
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234}  # lm-eval's own


def manager_for(entry: Entry, folder: Path) -> Any:
    """The definitions that a task needs: those of our folder or of one's own, and all of lm-eval's for a task that only
    it knows, or a group of one's own that names such tasks."""
    if entry.own is not None:
        return folder_manager(entry.own, defaults=refers_outside(entry.task, entry.own))
    return task_manager() if entry.known is None else folder_manager(folder)


def measure(
    entry: Entry, model: Any, manager: Any, *, limit: int | None, seed: int, allow_code: bool, tokens: int | None
) -> dict[str, Any]:
    """What lm-eval's `simple_evaluate` returns, items included.

    `tokens`: at most so many are generated, where the definition's number does not fit; None: the definition's.
    Raises InputError where the data set cannot be had.
    """
    from lm_eval import simple_evaluate

    with quiet(), _own_draws():
        try:
            loaded = manager.load([entry.task])
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InputError(
                f"task {entry.task!r}: its data set could not be loaded ({one_line(error)}); without a network "
                "give local files with --data-root, or name other tasks"
            ) from error
        try:
            found = simple_evaluate(
                model,
                tasks=[loaded["groups"][entry.task]] if entry.task in loaded["groups"] else [*loaded["tasks"].values()],
                num_fewshot=entry.shots,
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                task_manager=manager,
                gen_kwargs={"max_gen_toks": tokens} if tokens else None,
                confirm_run_unsafe_code=allow_code,
                fewshot_random_seed=1234 + seed,
                **SEEDS,
            )
        except AssertionError as error:
            if "max tokens to generate" not in str(error):
                raise
            raise InputError(f"task {entry.task!r}: its answers do not fit into the model's rows ({error})") from error
    assert found is not None
    return dict(found)


@contextmanager
def _own_draws() -> Iterator[None]:
    """lm-eval seeds the global generators; here they come back as they were."""
    import numpy as np
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def command(
    entry: Entry, *, path: str, settings: Mapping[str, Any], batch: int, limit: int | None, seed: int,
    tokens: int | None, folder: Path, device: str,
) -> str:  # fmt: skip
    """lm-eval's own command for the same numbers; for a student with linearize imported."""
    import shlex

    arguments = ",".join(f"{k}={v}" for k, v in {"pretrained": path, **settings}.items())
    start = ["python", "-m", "linearize.lm_eval", "--model", "linearize"]
    words = start if is_student(path) else ["lm_eval", "--model", "hf"]
    words += ["--model_args", arguments, "--tasks", entry.task]
    include = entry.own or (folder if entry.known is not None else None)
    words += ["--include_path", str(include)] if include is not None else []
    words += ["--num_fewshot", str(entry.shots)] if entry.shots is not None else []
    words += ["--limit", str(limit)] if limit is not None else []
    words += ["--gen_kwargs", f"max_gen_toks={tokens}"] if tokens else []
    words += ["--confirm_run_unsafe_code"] if entry.known is not None and entry.known.executes else []
    words += ["--seed", f"0,1234,1234,{1234 + seed}"] if seed else []
    return shlex.join([*words, "--batch_size", str(batch), "--device", device])
