"""One task measured on one contestant by lm-eval's own runner."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize.decoding.loading import is_student
from linearize.errors import InputError, one_line
from linearize.evaluation.harness.catalogue import Entry

BOOTSTRAP = 1000  # draws for metrics without a formula for their error (perplexity); lm-eval's command takes 100,000
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234}  # lm-eval's own


def need_harness() -> None:
    """Raise InputError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks need lm-eval, which is not installed: pip install 'linearize[eval]'")


def definitions() -> Path:
    """The folder of lm-eval's task definitions."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


@functools.cache
def task_manager() -> Any:
    """Everything that lm-eval knows: thousands of files, half a minute on a slow machine; so only where needed."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


def manager_for(entry: Entry, folder: Path) -> Any:
    """The definitions that a task needs: those of our folder or of one's own, and all of lm-eval's for a task that only
    it knows, or a group of one's own that names such tasks."""
    if entry.own is not None:
        return _manager(entry.own, defaults=refers_outside(entry.task, entry.own))
    return task_manager() if entry.known is None else _manager(folder)


def own_names(folder: Path) -> frozenset[str]:
    """The tasks, groups and tags that a folder of one's own defines. Raises InputError where there are none."""
    need_harness()
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one with task definitions of lm-eval's form (*.yaml)")
    if not (names := frozenset(_manager(folder).all_tasks)):
        raise InputError(f"{folder} holds no task definitions that lm-eval can read: a *.yaml file with `task: NAME`")
    return names


def refers_outside(task: str, folder: Path) -> bool:
    """Whether a group of one's own names tasks that its folder does not define."""
    index = _manager(folder).task_index

    def outside(members: Any) -> bool:
        for member in members if isinstance(members, list) else []:
            whole = isinstance(member, dict)
            name = member.get("group", member.get("task")) if whole else member
            if isinstance(name, str) and name in index:
                if outside((index[name].cfg or {}).get("task")):
                    return True
            elif whole and "group" in member:
                if outside(member.get("task")):
                    return True
            elif not (whole and "dataset_path" in member):
                return True
        return False

    return outside((index[task].cfg or {}).get("task"))


def _manager(folder: Path, *, defaults: bool = False) -> Any:
    """The definitions in a folder, with lm-eval's or without them."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager(include_path=str(folder), include_defaults=defaults)


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
def quiet() -> Iterator[None]:
    """lm-eval without its log, bars and prints, and without processes of its own for bootstraps."""
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.model
    import lm_eval.api.task
    import tqdm  # type: ignore[import-untyped]
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    before = transformers_logging.get_verbosity()

    class Silent(tqdm.tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    bars = {module: module.tqdm for module in (lm_eval.api.task, lm_eval.api.model, tqdm)}
    old = os.environ.get("DISABLE_MULTIPROC")
    maps = datasets.are_progress_bars_disabled()
    try:
        datasets.disable_progress_bars()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        for module in bars:
            module.tqdm = Silent
        lm_eval.api.metrics.print = lambda *text: None
        os.environ["DISABLE_MULTIPROC"] = "1"
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers_logging.set_verbosity(before)
        for module, bar in bars.items():
            module.tqdm = bar
        del lm_eval.api.metrics.print
        if not maps:
            datasets.enable_progress_bars()
        os.environ.pop("DISABLE_MULTIPROC")
        if old is not None:
            os.environ["DISABLE_MULTIPROC"] = old


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
