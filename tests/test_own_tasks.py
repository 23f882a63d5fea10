"""`linearize eval --tasks NAME --include-path DIR` with definitions of one's own; lm-eval's command on a student."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from byte_tokenizer import SIZE, byte_tokenizer
from models import mixer, student_of, tiny
from task_files import write_lines

from linearize.cli.main import main
from linearize.errors import InputError
from linearize.evaluation import EvaluationOptions, evaluate
from linearize.evaluation.harness import definitions
from linearize.evaluation.harness.definitions import folder_manager, refers_outside, task_specs
from linearize.evaluation.harness.model import isolated
from linearize.evaluation.sections.tasks import Tasks
from linearize.evaluation.suites import LOLCATS_TASKS, MAMBA_TASKS, plan_sections

pytest.importorskip("lm_eval", reason="tasks need lm-eval")
ITEMS = [
    {"question": f"The {thing} is", "choices": choices, "answer": i % 3}
    for i, (thing, choices) in enumerate(
        [("sky", ["blue", "a very long way down", "red"]), ("grass", ["green", "loud", "old"]),
         ("snow", ["cold", "white as a sheet", "hot"]), ("night", ["dark", "x", "day"]), ("sea", ["wet", "up", "dry"])]
    )
]  # fmt: skip
LAUNCHER = """
import sys
from lm_eval.tasks import TaskManager
read = TaskManager.__init__
TaskManager.__init__ = lambda self, *a, **k: read(self, *a, **{**k, "include_defaults": False})  # half a minute less
from linearize.lm_eval import main
words, code = sys.argv[1:], 0
for model in ("linearize", "hf"):
    sys.argv[1:] = ["--model", model, *words, "--output_path", model]
    code = code or main()
sys.exit(code)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher`, `student`, and in `own` the task `colours` and a group of it and one of lm-eval's."""
    path = tmp_path_factory.mktemp("own")
    teacher = tiny(vocab_size=SIZE, max_position_embeddings=128, eos_token_id=1, bos_token_id=0, attention="sdpa")
    for name, model in {"teacher": teacher, "student": student_of(teacher, mixer())}.items():
        model.save_pretrained(path / name)
        byte_tokenizer().save_pretrained(path / name)
    write_lines(path / "own" / "items.jsonl", ITEMS)
    definition = {
        "task": "colours", "dataset_path": "json", "test_split": "train", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": str(path / "own" / "items.jsonl"), "cache_dir": str(path / "cache")},
        "doc_to_text": "{{question}}", "doc_to_target": "answer", "doc_to_choice": "{{choices}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }  # fmt: skip
    for name in ("colours", "piqa"):
        (path / "own" / f"{name}.yaml").write_text(yaml.safe_dump({**definition, "task": name}))
    for name, members in {"mine": ["colours"], "mixed": ["colours", {"task": "arc_easy", "num_fewshot": 2}]}.items():
        (path / "own" / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": members}))
    return path


def by_lm_eval(model: Path, task: str, own: Path) -> dict[str, float]:
    """What lm-eval's own model class and runner give in this process."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with isolated():
        output = simple_evaluate(
            "hf",
            model_args={"pretrained": str(model)},
            tasks=[task],
            device="cpu",
            task_manager=TaskManager(include_path=str(own), include_defaults=False),
        )
    assert output is not None
    return numbers(output["results"][task])


def numbers(results: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in results.items() if name.startswith("acc") and "stderr" not in name}


@pytest.mark.parametrize(("task", "row"), [("colours", "colours"), ("piqa", "piqa"), ("mine", "colours")])
def test_the_command_takes_definitions_of_ones_own(
    task: str, row: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those in the folder come before lm-eval's of the same name; a group takes what it names."""
    argv = ["eval", str(folder / "student"), "--teacher", str(folder / "teacher"), "--tasks", task]
    argv += ["--include-path", str(folder / "own"), "--device", "cpu", "--json", "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    section = json.loads(capsys.readouterr().out)["sections"]["tasks"]
    assert section["models"]["teacher"][row]["n"] == len(ITEMS)
    assert f"--include_path {folder / 'own'}" in section["commands"][task]
    for name in ("teacher", "student"):
        ours = numbers(section["models"][name][row]["metrics"])
        assert ours == by_lm_eval(folder / name, row, folder / "own") and len(ours) == 2
    lines = (tmp_path / "out" / "samples" / f"{task}.student.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc"]["question"] for line in lines[:2]] == ["The sky is", "The grass is"]


@pytest.mark.slow
def test_lm_evals_command_takes_a_student(folder: Path, tmp_path: Path) -> None:
    own, student = folder / "own", folder / "student"
    argv = [
        "--model_args",
        f"pretrained={student}",
        "--tasks",
        "colours",
        "--device",
        "cpu",
        "--include_path",
        str(own),
    ]
    command = [sys.executable, "-c", LAUNCHER, *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    for model in ("linearize", "hf"):
        (written,) = (tmp_path / model).rglob("results_*.json")
        output = json.loads(written.read_text())
        assert numbers(output["results"]["colours"]) == by_lm_eval(student, "colours", own)


def test_a_student_alone_names_the_command_that_takes_it(folder: Path) -> None:
    options = EvaluationOptions(include_path=folder / "own", device="cpu")
    section = evaluate(folder / "student", tasks=["colours"], options=options).sections["tasks"]
    assert section["commands"]["colours"].startswith("python -m linearize.lm_eval --model linearize --model_args ")


def test_what_cannot_be_used_is_refused(folder: Path) -> None:
    def run(own: Path, *tasks: str) -> None:
        evaluate(folder / "student", tasks=tasks, options=EvaluationOptions(include_path=own, device="cpu"))

    with pytest.raises(InputError, match="not a folder"):
        run(folder / "none", "colours")
    with pytest.raises(InputError, match="--tasks"):
        run(folder / "own")
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="no task definitions"):
        run(folder / "empty", "colours")


def test_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Definitions of the folder come before lm-eval's, and keep their own shots."""
    own = folder / "own"
    theirs = type("M", (), {"all_tasks": ["piqa", "piqa_de", "sciq"]})
    monkeypatch.setattr(definitions, "task_manager", lambda: theirs)
    specs = task_specs(("colours:2", "piqa", "winogrande", "sciq", "mmlu", "gsm8k:2"), own)
    assert [spec.folder for spec in specs] == [own, own, None, None, None, None]
    assert [spec.shots for spec in specs] == [2, None, None, None, 5, 2]
    assert specs[3].manager is theirs and "winogrande" in specs[2].manager.all_tasks
    with pytest.raises(InputError, match="unknown task 'colour': did you mean 'colours'"):
        task_specs(("colour",), own)
    with pytest.raises(InputError, match="unknown task 'piqaa': did you mean 'piqa'") as error:
        task_specs(("piqaa",))
    assert "piqa_de" in str(error.value) and len(str(error.value)) < 500
    for tasks, cause in [(("mmlu:five",), "number of shots"), ((), "no tasks"), (("piqa", "piqa:2"), "given twice")]:
        with pytest.raises(InputError, match=cause):
            task_specs(tasks)


def test_lm_evals_tasks_are_read_only_where_a_group_names_them(folder: Path) -> None:
    """Reading all of them takes half a minute."""
    own = folder_manager(folder / "own")
    assert not refers_outside("mine", own) and not refers_outside("colours", own)
    assert refers_outside("mixed", own)


def test_items_and_definition_change_the_digest(folder: Path, tmp_path: Path) -> None:
    """What an interrupted run kept of other items, or of another definition, is not taken up."""
    definition = yaml.safe_load((folder / "own" / "colours.yaml").read_text())
    digests = []
    for items, text in ((ITEMS, "{{question}}"), (ITEMS[1:], "{{question}}"), (ITEMS, "{{question}}:")):
        place = tmp_path / str(len(digests))
        write_lines(place / "items.jsonl", items)
        definition["dataset_kwargs"] = {"data_files": str(place / "items.jsonl"), "cache_dir": str(place / "cache")}
        (place / "colours.yaml").write_text(yaml.safe_dump({**definition, "doc_to_text": text}))
        (spec,) = task_specs(("colours",), place)
        loaded = definitions.load(spec)
        digests.append(loaded.digest)
        assert loaded.digest == definitions.load(spec).digest and len(loaded.leaves[0].eval_docs) == len(items)
    assert len(set(digests)) == 3


def test_each_known_task_is_defined_in_the_folder_named() -> None:
    for name, known in definitions.KNOWN.items():
        (spec,) = task_specs((name,))
        assert name in spec.manager.task_index and (spec.folder, spec.shots) == (None, known.shots)
    assert task_specs(("humaneval",))[0].executes_code and not task_specs(("gsm8k",))[0].executes_code


@pytest.mark.parametrize(
    ("suite", "tasks", "include", "names"),
    [
        ("quick", (), False, None),
        ("quick", (), True, ("piqa", "arc_easy")),
        ("quick", ("boolq",), True, ("boolq",)),
        ("lolcats", (), True, LOLCATS_TASKS),
        ("mamba-in-llama", (), False, MAMBA_TASKS),
        ("mamba-in-llama", (), True, (*MAMBA_TASKS, "cruxeval")),
        (None, ("colours",), True, ("colours",)),
    ],
)
def test_tasks_of_a_suite(
    suite: str | None, tasks: tuple[str, ...], include: bool, names: tuple[str, ...] | None, folder: Path
) -> None:
    _, sections = plan_sections(suite, tasks, None, folder / "own" if include else None)
    chosen = [section.tasks for section in sections if isinstance(section, Tasks)]
    assert chosen == ([] if names is None else [names])
