"""A folder of task definitions that lm-eval reads: its own ones, included, with local data in the Hub's place.

`lm_eval --include_path FOLDER` gives the same items and prompts as our command.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from linearize.evaluation.harness import local_files, task_functions
from linearize.evaluation.harness.catalogue import KNOWN, Entry, Known
from linearize.evaluation.harness.definitions import definitions

FUNCTIONS = "task_functions"
DATA = "data"
GROUPS = ("_mmlu", "_mmlu_humanities", "_mmlu_other", "_mmlu_social_sciences", "_mmlu_stem")


class Function(str):
    """The name of a function in a definition."""


class _Dumper(yaml.SafeDumper):
    """Writes `Function` as lm-eval's tag."""


_Dumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar("!function", f"{FUNCTIONS}.{name}"))


def write_definitions(entries: Sequence[Entry], root: Path | None, folder: Path) -> None:
    """Definitions and data of all known tasks; with `root` None the data come from the Hub.

    An older folder is replaced. Raises InputError for a local row that is not of the layout.
    """
    if folder.exists():
        shutil.rmtree(folder)
    (folder / DATA).mkdir(parents=True)
    source = Path(task_functions.__file__)
    shutil.copyfile(source, folder / f"{FUNCTIONS}.py")
    for entry in entries:
        if entry.known is None:
            continue
        if entry.task == "mmlu":
            _write_mmlu(root, folder)
        else:
            _write_yaml(folder / f"{entry.task}.yaml", _definition(entry.task, entry.known, root, folder))


def _definition(task: str, known: Known, root: Path | None, folder: Path) -> dict[str, Any]:
    base = _cruxeval() if task == "cruxeval" else _humaneval() if task == "humaneval" else _included(known.definition)
    if root is None:
        return base
    local = {known.split: _write_rows(folder, f"{task}.{known.split}", local_files.rows(task, known, root))}
    shots: dict[str, Any] = {}
    if not known.own_shots and known.split == "test":
        shots = {"validation_split": None, "fewshot_split": "test"}  # lm-eval leaves the measured item out
    return {**base, "task": task, **_local(local), "training_split": None, **shots}


def _write_mmlu(root: Path | None, folder: Path) -> None:
    for subject in local_files.subjects():
        base = _included(f"mmlu/default/mmlu_{subject}.yaml")
        if root is not None:
            local = {}
            for split in ("dev", "test"):
                rows = local_files.subject_rows(subject, split, root)
                local[split] = _write_rows(folder, f"mmlu_{subject}.{split}", rows)
            base |= _local(local)
        _write_yaml(folder / f"mmlu_{subject}.yaml", base)
    for group in GROUPS:
        _write_yaml(folder / f"{group}.yaml", _included(f"mmlu/default/{group}.yaml"))


def _local(files: dict[str, str]) -> dict[str, Any]:
    return {
        "dataset_path": "local",
        "dataset_name": None,
        "custom_dataset": Function("splits"),
        "dataset_kwargs": {"local": files},
    }


def _included(definition: str) -> dict[str, Any]:
    return {"include": str(definitions() / definition)}


def _humaneval() -> dict[str, Any]:
    """lm-eval's definition with functions that need no network (its own fetch a metric from the Hub on import)."""
    from lm_eval.tasks._yaml_loader import load_yaml

    found = load_yaml(definitions() / KNOWN["humaneval"].definition, resolve_func=False)
    found["metric_list"][0]["metric"] = Function("pass_at_k")
    found["filter_list"][0]["filter"][0]["filter_fn"] = Function("build_predictions")
    return dict(found)


def _cruxeval() -> dict[str, Any]:
    """Output prediction of CRUXEval (Gu et al. 2024), two examples, the answer between tags."""
    return {
        "task": "cruxeval",
        "dataset_path": "cruxeval-org/cruxeval",
        "test_split": "test",
        "output_type": "generate_until",
        "description": "Complete the assertion with the literal that the function returns for the given input, even if "
        "the function is wrong or incomplete. Write the whole assertion between [ANSWER] and [/ANSWER].\n\n",
        "doc_to_text": "[PYTHON]\n{{code}}\nassert f({{input}}) == ??\n[/PYTHON]\n[ANSWER]",
        "doc_to_target": "assert f({{input}}) == {{output}}\n[/ANSWER]",
        "target_delimiter": "\n",
        "num_fewshot": 2,
        "fewshot_config": {
            "sampler": "first_n",
            "samples": [
                {"code": "def f(n):\n    return 3 * n", "input": "4", "output": "12"},
                {"code": "def f(s):\n    return [s, s[0]]", "input": "'moon'", "output": "['moon', 'm']"},
            ],
        },
        "generation_kwargs": {"until": ["[/ANSWER]", "[PYTHON]"], "max_gen_toks": 256, "do_sample": False},
        "filter_list": [{"name": "literal", "filter": [{"function": "take_first"}]}],
        "process_results": Function("literal_results"),
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def _write_rows(folder: Path, name: str, rows: local_files.Rows) -> str:
    place = f"{DATA}/{name}.jsonl"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / place).write_text(lines, encoding="utf-8", newline="\n")
    return place


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True), encoding="utf-8")
