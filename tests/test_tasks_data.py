"""Local task files: turned back into original rows exactly, missing ones named, code tried, literals compared."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from task_files import WINOGRANDE, write_data, write_lines

from linearize.errors import InputError
from linearize.evaluation.harness import catalogue, local_files, originals
from linearize.evaluation.harness.catalogue import KNOWN, Entry, entries
from linearize.evaluation.harness.task_functions import (
    build_predictions,
    literal_results,
    pass_at_k,
    passes,
    same_literal,
)


def shared_rows(shared_dir: Path, task: str) -> tuple[list[dict], list[dict]]:
    path = shared_dir / "data" / "eval" / KNOWN[task].file
    given = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return given, local_files.rows(task, KNOWN[task], shared_dir / "data" / "eval")


@pytest.mark.parametrize("task", ["piqa", "arc_easy", "arc_challenge", "boolq"])
def test_the_definition_makes_the_local_prompt_again(shared_dir: Path, task: str) -> None:
    given, rows = shared_rows(shared_dir, task)
    assert len(given) == len(rows) > 1000
    for local, row in zip(given, rows, strict=True):
        prompt = {  # the templates of lm-eval's definitions
            "piqa": lambda row: f"Question: {row['goal']}\nAnswer:",
            "boolq": lambda row: f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:",
        }.get(task, lambda row: f"Question: {row['question']}\nAnswer:")(row)
        query = local["query"].removeprefix("Passage: ") if task == "boolq" else local["query"]
        assert prompt == query.rstrip("\n") + "\nAnswer:"
        if task == "piqa":
            assert [row["sol1"], row["sol2"]] == local["choices"] and row["label"] == local["gold"]
        elif task.startswith("arc"):
            assert row["choices"]["text"] == local["choices"]
            assert row["choices"]["label"].index(row["answerKey"]) == local["gold"]


def test_winogrande_gap_and_options(shared_dir: Path) -> None:
    given, rows = shared_rows(shared_dir, "winogrande")
    for local, row in zip([*WINOGRANDE, *given], [*map(originals.winogrande, WINOGRANDE), *rows], strict=True):
        gap = row["sentence"].index("_")
        assert [row["sentence"][:gap] + row[o] for o in ("option1", "option2")] == local["context_options"]
        assert row["sentence"][gap + 1 :].strip() == local["continuation"]
        assert {"1": 0, "2": 1}[row["answer"]] == local["gold"]
        assert not row["sentence"][gap - 1].isalnum()  # options are whole words


def test_lambada_and_mmlu(shared_dir: Path) -> None:
    given, rows = shared_rows(shared_dir, "lambada_openai")
    for local, row in zip(given, rows, strict=True):
        assert row["text"].split(" ")[-1] == local["continuation"]
        assert " ".join(row["text"].split(" ")[:-1]) == local["context"]
    found = local_files.subject_rows("astronomy", "dev", shared_dir / "data" / "eval")
    assert len(found) == 5 and all(len(row["choices"]) == 4 and row["answer"] in range(4) for row in found)


def test_a_row_of_another_layout_names_file_and_line(tmp_path: Path) -> None:
    root = write_data(tmp_path)
    path = root / KNOWN["piqa"].file
    lines = path.read_text().split("\n")
    for broken, said in [
        ('{"query": "Q: no", "choices": ["a", "b"], "gold": 0}', "line 3: not of the expected layout"),
        ('{"choices": ["a", "b"], "gold": 0}', "line 3: no field query; expected query, choices, gold"),
        ("{", "line 3: no JSON"),
    ]:
        path.write_text("\n".join([*lines[:2], broken, *lines[2:]]))
        with pytest.raises(InputError, match=said):
            local_files.rows("piqa", KNOWN["piqa"], root)


def test_missing_files_are_all_named(tmp_path: Path) -> None:
    root = write_data(tmp_path)
    lacking = local_files.missing(entries(("race", "piqa", "pubmedqa", "truthfulqa_mc2")), root)
    assert list(lacking) == ["race", "pubmedqa", "truthfulqa_mc2"]
    text = str(local_files.refuse(lacking, root))
    for part in ("race.jsonl", "article, problems", "EleutherAI/race", "bigbio/pubmed_qa", "--skip-missing"):
        assert part in text
    assert "\n" not in text


def test_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(e.task, e.shots) for e in entries(("mmlu", "mmlu_x:3", "piqa", "gsm8k:2")[:1])] == [("mmlu", 5)]
    assert Entry.parse("gsm8k:2").shots == 2 and Entry.parse("piqa").shots is None
    for given, said in [(("mmlu:five",), "number of shots"), ((), "no tasks"), (("piqa", "piqa:2"), "given twice")]:
        with pytest.raises(InputError, match=said):
            entries(given)
    monkeypatch.setattr(catalogue, "task_manager", lambda: type("M", (), {"all_tasks": ["piqa", "piqa_de", "sciq"]}))
    assert entries(("sciq",))[0].known is None
    with pytest.raises(InputError, match="unknown task 'piqaa': did you mean 'piqa'") as error:
        catalogue.entries(("piqaa",))
    assert "piqa_de" in str(error.value) and len(str(error.value)) < 500


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
    assert same_literal(answer, truth) is same


def test_literal_of_an_assertion() -> None:
    doc = {"output": "'a == b'"}
    assert literal_results(doc, ["\nassert f(1) == 'c'\n[/ANSWER] more"]) == {"exact_match": 0.0}
    assert literal_results({"output": "[3]"}, ["assert f({1: '=='}) == [3]\n"]) == {"exact_match": 1.0}
    assert literal_results(doc, ["'a == b'"]) == {"exact_match": 1.0}
    assert literal_results(doc, ["assert f(1) == 'a == b'"]) == {"exact_match": 1.0}
    assert literal_results(doc, ["assert f(1) =="]) == {"exact_match": 0.0}


def test_code_runs_to_its_end_or_fails() -> None:
    test = "def check(f):\n    assert f(2) == 4\n\ncheck(g)"
    right, wrong = "def g(x):\n    return 2 * x\n", "def g(x):\n    return x + 1\n"
    assert pass_at_k([test], [[right]], k=[1]) == {"pass@1": 1.0}
    assert pass_at_k([test], [[wrong]], k=[1]) == {"pass@1": 0.0}
    early = "def g(x):\n    raise SystemExit(0)\n"  # leaves with success before the tests passed
    assert pass_at_k([test], [[early]], k=[1]) == {"pass@1": 0.0}
    assert build_predictions([["return 1"]], [{"prompt": "def f():\n    "}]) == [["def f():\n    return 1"]]


def test_code_has_a_time_limit() -> None:
    start = time.monotonic()
    assert not passes("while True: pass", seconds=0.5)
    assert not passes("import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
                      seconds=0.5)  # fmt: skip
    assert time.monotonic() - start < 20
    assert not passes("x = '\0'") and not passes("print('all tests passed')\nraise ValueError")


def test_empty_file(tmp_path: Path) -> None:
    write_lines(tmp_path / KNOWN["piqa"].file, [])
    with pytest.raises(InputError, match="holds no items"):
        local_files.rows("piqa", KNOWN["piqa"], tmp_path)
