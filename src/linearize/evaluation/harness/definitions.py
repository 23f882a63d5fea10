"""lm-eval's task definitions: where they are, which names they define, and lm-eval loaded without its noise."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from linearize.errors import InputError


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


def own_names(folder: Path) -> frozenset[str]:
    """The tasks, groups and tags that a folder of one's own defines. Raises InputError where there are none."""
    need_harness()
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one with task definitions of lm-eval's form (*.yaml)")
    if not (names := frozenset(folder_manager(folder).all_tasks)):
        raise InputError(f"{folder} holds no task definitions that lm-eval can read: a *.yaml file with `task: NAME`")
    return names


def refers_outside(task: str, folder: Path) -> bool:
    """Whether a group of one's own names tasks that its folder does not define."""
    index = folder_manager(folder).task_index

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


def folder_manager(folder: Path, *, defaults: bool = False) -> Any:
    """The definitions in a folder, with lm-eval's or without them."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager(include_path=str(folder), include_defaults=defaults)


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
