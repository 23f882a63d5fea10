"""Which tasks are measured: lm-eval's definitions by name, those of the user's folder first, loaded with their data."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import InputError, one_line, unknown
from linearize.evaluation.harness.model import isolated

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

DEFAULT_NEW_TOKENS = 256  # lm-eval's, where a definition that generates names no number
LARGE = 1 << 20  # bytes: such a file holds data, not definitions


@dataclass(frozen=True, kw_only=True)
class Known:
    """What this package adds to a definition of lm-eval: the metric reported first (`name,filter`), the usual shots.

    `folder`: where the definition is below lm-eval's tasks; reading that folder alone saves half a minute.
    """

    folder: str
    metric: str = "acc,none"
    shots: int | None = None
    note: str = ""


KNOWN: dict[str, Known] = {
    "piqa": Known(folder="piqa"),
    "arc_easy": Known(folder="arc"),
    "arc_challenge": Known(folder="arc", metric="acc_norm,none"),
    "hellaswag": Known(folder="hellaswag", metric="acc_norm,none"),
    "winogrande": Known(folder="winogrande"),
    "mmlu": Known(folder="mmlu/default", shots=5),
    "openbookqa": Known(folder="openbookqa", metric="acc_norm,none"),
    "race": Known(folder="race"),
    "truthfulqa_mc2": Known(folder="truthfulqa", shots=0, note="six fixed examples are part of the prompt"),
    "pubmedqa": Known(folder="pubmedqa"),
    "boolq": Known(folder="super_glue/boolq"),
    "lambada_openai": Known(folder="lambada"),
    "gsm8k": Known(folder="gsm8k", metric="exact_match,strict-match", shots=5),
    "gsm8k_cot": Known(folder="gsm8k", metric="exact_match,strict-match", shots=8),
    "humaneval": Known(folder="humaneval", metric="pass@1,create_test", shots=0),
}


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A task by name, with its shots (None: the definition's) and the definitions that it is part of.

    `folder`: the user's folder that defines it; None for lm-eval's own definition.
    """

    task: str
    shots: int | None
    folder: Path | None
    manager: TaskManager

    @property
    def executes_code(self) -> bool:
        """Whether the definition says so; of a group's members only `LoadedTask` knows."""
        return bool((self.manager.task_index[self.task].cfg or {}).get("unsafe_code"))


@dataclass(frozen=True, kw_only=True)
class LoadedTask:
    """A task with its data. `members`: what lm-eval runs, a group or single tasks; `leaves`: the single tasks."""

    spec: TaskSpec
    members: list[Any]
    leaves: list[ConfigurableTask]

    @property
    def executes_code(self) -> bool:
        """Whether any of its tasks runs what the model writes."""
        return any(getattr(task, "UNSAFE_CODE", False) for task in self.leaves)

    @functools.cached_property
    def digest(self) -> str:
        """Changes with the items, and with the files of a folder of definitions."""
        state = hashlib.sha256()
        for task in self.leaves:
            for doc in task.eval_docs:
                state.update(json.dumps(doc, sort_keys=True, default=str).encode())
        for path in sorted(self.spec.folder.rglob("*")) if self.spec.folder is not None else ():
            if path.is_file() and path.stat().st_size < LARGE and "__pycache__" not in path.parts:
                state.update(str(path).encode() + path.read_bytes())
        return state.hexdigest()[:20]

    @functools.cached_property
    def new_tokens(self) -> int:
        """Tokens generated for an item, at most; 0 for tasks that score given answers."""
        settings = [task.config.generation_kwargs or {} for task in self.leaves if task.OUTPUT_TYPE == "generate_until"]
        return max((int(setting.get("max_gen_toks", DEFAULT_NEW_TOKENS)) for setting in settings), default=0)

    @property
    def notes(self) -> list[str]:
        """What a reader of its score should know: `metadata.note` of the definition, and where examples come from."""
        known = KNOWN.get(self.spec.task) if self.spec.folder is None else None
        notes = [known.note] if known is not None and known.note else []
        notes += dict.fromkeys(note for task in self.leaves if (note := (task.config.metadata or {}).get("note")))
        if any(_shots(self.spec, task) and _examples_are_items(task) for task in self.leaves):
            notes.append("few-shot examples come from the measured items, without the item that is asked")
        return notes


def need_harness() -> None:
    """Raise InputError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("tasks need lm-eval, which is not installed: pip install 'linearize[eval]'")


def task_specs(tasks: tuple[str, ...], include_path: Path | None = None) -> tuple[TaskSpec, ...]:
    """Return the tasks named (`mmlu:5`: five shots); definitions in `include_path` come before lm-eval's.

    Raises InputError for none, for the same task twice, for a name that nobody defines, for a folder of no definitions.
    """
    own = None if include_path is None else _own_definitions(include_path)
    names = [text.strip().partition(":")[0] for text in tasks]
    if not names:
        raise InputError(f"no tasks given: name some of {', '.join(KNOWN)}, or any of lm-eval's")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"tasks given twice: {', '.join(twice)}; name each one once")
    specs = []
    for text in tasks:
        name, colon, number = text.strip().partition(":")
        if colon and not number.isdecimal():
            raise InputError(f"task {text!r}: the part behind the colon is the number of shots, as in mmlu:5")
        shots = int(number) if colon else None
        if include_path is not None and own is not None and name in own.task_index:
            manager = folder_manager(include_path, defaults=True) if refers_outside(name, own) else own
            specs.append(TaskSpec(task=name, shots=shots, folder=include_path, manager=manager))
        else:
            usual = KNOWN[name].shots if name in KNOWN else None
            manager = _lm_evals(name, own)
            specs.append(TaskSpec(task=name, shots=usual if shots is None else shots, folder=None, manager=manager))
    return tuple(specs)


def load(spec: TaskSpec, *, allow_code: bool = False) -> LoadedTask:
    """Load a task's data. Raises InputError where they cannot be loaded."""
    with isolated(allow_code=allow_code):
        try:
            loaded = spec.manager.load([spec.task])
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise InputError(
                f"task {spec.task!r}: its data set could not be loaded ({one_line(error)}); without a network "
                "give definitions on local files with --include-path, or name other tasks"
            ) from error
    groups, tasks = loaded["groups"], loaded["tasks"]
    members = [groups[spec.task]] if spec.task in groups else [*tasks.values()]
    return LoadedTask(spec=spec, members=members, leaves=[*tasks.values()])


def folder_manager(folder: Path | None, *, defaults: bool = False) -> TaskManager:
    """Read the definitions in a folder, after lm-eval's own or alone."""
    from lm_eval.tasks import TaskManager

    with isolated():
        return TaskManager(include_path=None if folder is None else str(folder), include_defaults=defaults)


@functools.cache
def task_manager() -> TaskManager:
    """Read everything that lm-eval defines: thousands of files, half a minute on a slow machine."""
    return folder_manager(None, defaults=True)


@functools.cache
def _known_manager(folder: str) -> TaskManager:
    import lm_eval.tasks

    return folder_manager(Path(lm_eval.tasks.__file__).parent / folder)


def _lm_evals(name: str, own: TaskManager | None) -> TaskManager:
    if name in KNOWN:
        return _known_manager(KNOWN[name].folder)
    if name not in (others := task_manager().all_tasks):
        near = difflib.get_close_matches(name, others, n=5)
        raise unknown("task", name, {*KNOWN, *near, *(own.all_tasks if own is not None else ())})
    return task_manager()


def _own_definitions(folder: Path) -> TaskManager:
    need_harness()
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give one with task definitions of lm-eval's form (*.yaml)")
    manager = folder_manager(folder)
    if not manager.all_tasks:
        raise InputError(f"{folder} holds no task definitions that lm-eval can read: a *.yaml file with `task: NAME`")
    return manager


def refers_outside(task: str, own: TaskManager) -> bool:
    """Whether a group of the user's folder names tasks that the folder does not define."""

    def outside(members: object) -> Iterator[bool]:
        for member in members if isinstance(members, list) else []:
            inline = isinstance(member, dict)
            name = member.get("group", member.get("task")) if inline else member
            if isinstance(name, str) and name in own.task_index:
                yield from outside((own.task_index[name].cfg or {}).get("task"))
            elif inline and "group" in member:
                yield from outside(member.get("task"))
            else:
                yield not (inline and "dataset_path" in member)

    return any(outside((own.task_index[task].cfg or {}).get("task")))


def _shots(spec: TaskSpec, task: ConfigurableTask) -> int:
    """The shots that lm-eval takes: a definition with none keeps none."""
    defined = task.config.num_fewshot
    return int((defined if defined == 0 or spec.shots is None else spec.shots) or 0)


def _examples_are_items(task: ConfigurableTask) -> bool:
    """Whether few-shot examples come from the split that is measured."""
    config, examples = task.config, task.config.fewshot_config
    measured = config.test_split or config.validation_split
    if examples.split:
        return bool(examples.split == measured)
    return (
        not (examples.samples or config.training_split) and (config.validation_split or config.test_split) == measured
    )
