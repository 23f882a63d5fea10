"""The task definitions in benchmarks/tasks: their items and prompts, the files they read, the code that they call."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from task_files import DEFINITIONS, task_functions, write_data, write_lines

from linearize.errors import InputError
from linearize.evaluation.harness.definitions import load, task_specs

pytest.importorskip("lm_eval", reason="tasks need lm-eval")
FROZEN: dict[str, dict[str, list[Any]]] = json.loads((Path(__file__).parent / "task_prompts.json").read_text())
"""By task as it is asked for and by single task: items, and a digest of the first 20, from lm-eval 0.4.13's own
definitions on rows turned back into those of the Hub."""


def prompts(spec: str) -> dict[str, list[Any]]:
    """By single task: the number of items, and a digest of requests and targets of the first 20."""
    (named,) = task_specs((spec,), DEFINITIONS)
    frozen = {}
    for task in load(named, allow_code=True).leaves:
        if named.shots is not None:
            task.set_config("num_fewshot", named.shots)
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=20, rank=0, world_size=1)
        requests = sorted(task.instances, key=lambda request: (request.doc_id, request.idx))
        rows = [[r.doc_id, r.idx, [str(arg) for arg in r.args], str(task.doc_to_target(r.doc))] for r in requests]
        frozen[task.task_name] = [len(task.eval_docs), hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]]
    return frozen


@pytest.mark.parametrize("spec", FROZEN)
def test_items_and_prompts_are_those_of_lm_evals_definitions(
    spec: str, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shared_dir / "data" / "eval"
    if not root.is_dir():
        pytest.skip(f"needs the task files in {root}")
    monkeypatch.setenv("LINEARIZE_EVAL_DATA", str(root))
    assert prompts(spec) == FROZEN[spec]


def test_each_mmlu_subject_has_a_definition_in_a_group() -> None:
    (named,) = task_specs(("mmlu",), DEFINITIONS)
    names = {name for name in named.manager.all_subtasks if name.startswith("mmlu_")}
    groups = [f"mmlu_{name}" for name in ("stem", "humanities", "social_sciences", "other")]
    tagged = [named.manager.task_index[f"{group}_tasks"].tags for group in groups]
    assert len(names) == sum(map(len, tagged)) == 57 and set().union(*tagged) == names


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = write_data(tmp_path / "data")
    monkeypatch.setenv("LINEARIZE_EVAL_DATA", str(root))
    return root


@pytest.mark.parametrize("task", ["gsm8k", "winogrande"])
def test_few_shot_examples_leave_the_item_out(data: Path, task: str) -> None:
    (named,) = task_specs((f"{task}:4",), DEFINITIONS)
    loaded = load(named)
    (definition,) = loaded.leaves
    definition.set_fewshot_seed(1234)
    for doc in definition.eval_docs:
        prompt = definition.fewshot_context(doc, 4)
        if task == "gsm8k":
            assert prompt.count(doc["question"]) == 1 and prompt.endswith(f"Question: {doc['question']}\nAnswer:")
            assert prompt.count("####") == 4
        else:  # one context for each option
            solved = f"{doc['context_options'][doc['gold']]} {doc['continuation']}"
            assert len(prompt) == 2 and all(text.count("\n\n") == 4 and solved not in text for text in prompt)
    assert any("without the item that is asked" in note for note in loaded.notes)


def test_lm_evals_command_passes_the_arguments_of_the_model_too(data: Path) -> None:
    from lm_eval.tasks import TaskManager

    write_data(data, subjects=["anatomy"])
    settings = {"pretrained": "path", "max_length": 512, "name": "x"}
    manager = TaskManager(include_path=str(DEFINITIONS), include_defaults=False, metadata=settings)
    tasks = manager.load(["piqa", "mmlu_anatomy"])["tasks"]
    assert {name: len(task.eval_docs) for name, task in tasks.items()} == {"piqa": 9, "mmlu_anatomy": 2}


def test_what_cannot_be_read_names_file_and_line(data: Path) -> None:
    (named,) = task_specs(("piqa",), DEFINITIONS)
    path = data / "multiple_choice" / "piqa.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:2], "{", *lines[2:]]))
    with pytest.raises(InputError, match=r"piqa\.jsonl, line 3"):
        load(named)
    write_lines(path, [])
    with pytest.raises(InputError, match=r"piqa\.jsonl"):
        load(named)
    path.unlink()
    with pytest.raises(InputError, match=r"piqa\.jsonl .*LINEARIZE_EVAL_DATA"):
        load(named)


@pytest.mark.parametrize(
    ("answer", "truth", "same"),
    [
        ("[(1, 'a')]", "[(1,'a')]", True),
        ('"x"', "'x'", True),
        ("'x'", "x", False),
        ("{1: 2}", "{1: 3}", False),
        ("1 + 1", "2", False),  # nothing is computed
        ("__import__('os').getcwd()", "''", False),
        ("(" * 5000, "()", False),
    ],
)
def test_literals(answer: str, truth: str, same: bool) -> None:
    assert task_functions().same_literal(answer, truth) is same


def test_literal_of_an_assertion() -> None:
    literal_results = task_functions().literal_results
    doc = {"output": "'a == b'"}
    assert literal_results(doc, ["\nassert f(1) == 'c'\n[/ANSWER] more"]) == {"exact_match": 0.0}
    assert literal_results({"output": "[3]"}, ["assert f({1: '=='}) == [3]\n"]) == {"exact_match": 1.0}
    assert literal_results(doc, ["'a == b'"]) == {"exact_match": 1.0}
    assert literal_results(doc, ["assert f(1) == 'a == b'"]) == {"exact_match": 1.0}
    assert literal_results(doc, ["assert f(1) =="]) == {"exact_match": 0.0}


def test_code_runs_to_its_end_or_fails() -> None:
    functions = task_functions()
    test = "def check(f):\n    assert f(2) == 4\n\ncheck(g)"
    right, wrong = "def g(x):\n    return 2 * x\n", "def g(x):\n    return x + 1\n"
    assert functions.pass_at_k([test], [[right]], k=[1]) == {"pass@1": 1.0}
    assert functions.pass_at_k([test], [[wrong]], k=[1]) == {"pass@1": 0.0}
    early = "def g(x):\n    raise SystemExit(0)\n"  # leaves with success before the tests passed
    assert functions.pass_at_k([test], [[early]], k=[1]) == {"pass@1": 0.0}
    predictions = functions.build_predictions([["return 1"]], [{"prompt": "def f():\n    "}])
    assert predictions == [["def f():\n    return 1"]]


def test_code_has_a_time_limit() -> None:
    passes = task_functions().passes
    start = time.monotonic()
    assert not passes("while True: pass", seconds=0.5)
    assert not passes("import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
                      seconds=0.5)  # fmt: skip
    assert time.monotonic() - start < 20
    assert not passes("x = '\0'") and not passes("print('all tests passed')\nraise ValueError")
