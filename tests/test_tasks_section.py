"""The section Tasks: lm-eval's own numbers, students beside the teacher, interruptions, shares, what is shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import SIZE, byte_tokenizer
from models import mixer, student_of, tiny
from task_files import write_data

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel
from linearize.evaluation.harness.catalogue import Entry
from linearize.evaluation.harness.folder import write_definitions
from linearize.evaluation.result_cache import ResultCache
from linearize.evaluation.sections.tasks import Tasks

pytest.importorskip("lm_eval", reason="tasks need lm-eval")
LENGTH = 160


@pytest.fixture(scope="module")
def eval_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvalModel, ...]:
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = byte_tokenizer()
    teacher = tiny(vocab_size=SIZE, max_position_embeddings=LENGTH, eos_token_id=1, bos_token_id=0, attention="sdpa")
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    student = student_of(teacher, mixer())
    return tuple(
        EvalModel(name=name, role=role, path=str(folder), model=model, tokenizer=tokenizer, fingerprint=name)
        for name, role, model in (("teacher", "teacher", teacher), ("student", "student", student))
    )


@pytest.fixture
def ctx(eval_models: tuple[EvalModel, ...], tmp_path: Path) -> EvalContext:
    return EvalContext(models=eval_models, data_root=write_data(tmp_path / "data"), out=tmp_path / "out")


def run(ctx: EvalContext, *tasks: str, **fields: Any) -> dict[str, Any]:
    section = Tasks(tasks=tasks, **fields)
    section.check(ctx)
    numbers: dict[str, Any] = json.loads(json.dumps(section.run(ctx)))
    return numbers


def by_lm_eval(numbers: dict[str, Any], folder: Path, task: str, path: str, tokens: int | None) -> dict[str, Any]:
    """lm-eval alone, on the folder that was left, with its own model class and nothing of ours."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        "hf",
        model_args={"pretrained": path},
        tasks=[task],
        num_fewshot=numbers["models"]["teacher"][task]["shots"],
        batch_size=numbers["batch"],
        device="cpu",
        gen_kwargs={"max_gen_toks": tokens} if tokens else None,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    assert found is not None
    return dict(found)


@pytest.mark.parametrize(
    ("task", "shots", "items", "tokens"),
    [("piqa", 0, 9, None), ("winogrande", 2, 5, None), ("cruxeval", 2, 3, 80), ("gsm8k", 1, 5, 80)],
)
def test_the_teachers_numbers_are_lm_evals(ctx: EvalContext, task: str, shots: int, items: int, tokens: int) -> None:
    ctx = replace(ctx, models=ctx.models[:1])
    numbers = run(ctx, f"{task}:{shots}")
    assert ctx.out is not None
    ours = numbers["models"]["teacher"][task]
    found = by_lm_eval(numbers, ctx.out / "tasks", task, ctx.models[0].path, tokens)
    assert ours["metrics"] == {key: value for key, value in found["results"][task].items() if "," in key}
    lines = (ctx.out / "samples" / f"{task}.teacher.jsonl").read_text().split("\n")
    ours_said = [json.loads(line)["resps"] for line in lines if line]
    theirs = json.loads(json.dumps([sample["resps"] for sample in found["samples"][task]]))
    assert ours_said == theirs and len({str(said) for said in ours_said}) > 1  # to the last bit
    assert ours["score"] == pytest.approx(ours["metrics"][ours["metric"]])
    assert (ours["n"], ours["shots"], ours["chance"]) == (items, shots, 0.0 if tokens else 0.5)
    command = numbers["commands"][task]
    assert f"--tasks {task} --include_path {ctx.out / 'tasks'} --num_fewshot {shots}" in command
    assert ("max_gen_toks=80" in command) == ("not 256" in numbers["notes"].get(task, "")) == bool(tokens)
    assert ("measured item left out" in numbers["notes"].get(task, "")) == (task in ("winogrande", "gsm8k"))


def test_scores_against_plain_log_likelihoods(ctx: EvalContext) -> None:
    """Every PIQA item scored one by one, without padding, without lm-eval: for the student too."""
    numbers = run(ctx, "piqa")
    from task_files import PIQA

    for eval_model in ctx.models:
        hits = []
        for item in PIQA:
            context = item["query"] + "Answer:"
            scores = [continuation_score(eval_model, context, " " + choice) for choice in item["choices"]]
            hits.append(scores.index(max(scores)) == item["gold"])
        assert numbers["models"][eval_model.name]["piqa"]["metrics"]["acc,none"] == pytest.approx(sum(hits) / len(hits))
    assert ctx.out is not None
    lines = (ctx.out / "samples" / "piqa.student.jsonl").read_text().split("\n")
    assert [json.loads(line)["doc"]["goal"] for line in lines[:2]] == [
        "how to open a jar",
        "how to lift a stone of some weight",
    ]


@pytest.mark.slow
def test_an_answer_longer_than_the_models_rows_gets_longer_ones(ctx: EvalContext) -> None:
    """lm-eval alone stops with an assertion there; with the rows of our command it gives the same numbers."""
    assert ctx.data_root is not None and ctx.out is not None
    path = ctx.data_root / "multiple_choice" / "piqa.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2]["choices"][1] = "and then again " * 14  # 210 tokens
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    numbers = run(ctx, "piqa", "winogrande")
    assert "max_length=256" in numbers["commands"]["piqa"] and "rows of 256 tokens" in numbers["notes"]["piqa"]
    assert f"max_length={LENGTH}" in numbers["commands"]["winogrande"]
    whole = continuation_score(ctx.models[1], rows[2]["query"] + "Answer:", " " + rows[2]["choices"][1])
    lines = (ctx.out / "samples" / "piqa.student.jsonl").read_text().splitlines()
    assert float(json.loads(lines[2])["resps"][1][0][0]) == pytest.approx(whole, rel=1e-4)


def continuation_score(eval_model: EvalModel, context: str, continuation: str) -> float:
    ids = eval_model.tokenizer(context + continuation)["input_ids"]
    start = len(eval_model.tokenizer(context)["input_ids"])
    with torch.no_grad():
        logprobs = eval_model.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids)))


@pytest.mark.parametrize("task", ["gsm8k", "winogrande"])
def test_few_shot_examples_leave_the_item_out(tmp_path: Path, task: str) -> None:
    from lm_eval.tasks import TaskManager

    write_definitions([Entry(task, 4)], write_data(tmp_path / "data"), tmp_path / "tasks")
    found = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False).load([task])["tasks"][task]
    found.set_fewshot_seed(1234)
    for doc in found.eval_docs:
        prompt = found.fewshot_context(doc, 4)
        if task == "gsm8k":
            assert prompt.count(doc["question"]) == 1 and prompt.endswith(f"Question: {doc['question']}\nAnswer:")
            assert prompt.count("####") == 4
        else:  # one context for each option
            solved = doc["sentence"].replace("_", doc[f"option{doc['answer']}"])
            assert len(prompt) == 2 and all(text.count("\n\n") == 4 and solved not in text for text in prompt)


def test_tokens_of_pairs_are_lm_evals(eval_models: tuple[EvalModel, ...]) -> None:
    """With a tokenizer whose tokens cross the border between context and continuation."""
    from lm_eval.api.model import TemplateLM
    from transformers import AutoTokenizer

    import linearize.demo
    from linearize.evaluation.harness.model import Pairs, harness_model

    tokenizer = AutoTokenizer.from_pretrained(Path(linearize.demo.__file__).parent / "teacher")
    pairs = Pairs()
    model = harness_model(replace(eval_models[0], tokenizer=tokenizer), batch=2, max_length=LENGTH, pairs=pairs)
    texts = [
        ("Once upon a ti", "me there was"),
        ("The dog ran. ", "It"),
        ("A cat", " sat"),
        ("A cat", " ran"),
        ("B ", " c"),
    ]
    pairs.add(texts, model.tokens)
    for context, continuation in texts:
        assert model._encode_pair(context, continuation) == TemplateLM._encode_pair(model, context, continuation)
    assert pairs.found["A cat", " sat"][0] is pairs.found["A cat", " ran"][0]
    alone = tokenizer(texts[0][1], add_special_tokens=False)["input_ids"]
    assert pairs.found[texts[0]][1] != alone


def test_generation_in_a_padded_batch_is_that_alone(ctx: EvalContext) -> None:
    from lm_eval.api.instance import Instance

    from linearize.evaluation.harness.answers import Answers
    from linearize.evaluation.harness.model import Pairs, harness_model

    prompts = ["a", "some longer prompt", "the one that is by far the longest of them all"]
    for eval_model in ctx.models:
        texts = []
        for batch in (1, 3):
            model = harness_model(eval_model, batch=batch, max_length=LENGTH, pairs=Pairs())
            model.answers = Answers(None, lambda done, asked: None)
            requests = [
                Instance("generate_until", {}, (prompt, {"until": ["\n\n"], "max_gen_toks": 11, "do_sample": False}), 0)
                for prompt in prompts
            ]
            texts.append(model.generate_until(requests))
        assert texts[0] == texts[1] and len(set(texts[0])) > 1
    assert ctx.tokenizer.pad_token is None  # lm-eval's padding token is not left behind


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.slow
def test_an_interrupted_run_continues(ctx: EvalContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(ctx, "winogrande", "piqa")
    monkeypatch.setattr("linearize.evaluation.harness.answers.COMMIT_EVERY", 0.0)
    monkeypatch.setattr("linearize.evaluation.harness.model.CPU_ROWS", 2)

    def stop(what: str, done: int, total: int) -> None:
        if what == "piqa, student: requests" and done == 8:
            assert total == 18
            raise Stop

    kept = replace(ctx, results=ResultCache(tmp_path / "kept"))
    with pytest.raises(Stop):
        run(replace(kept, progress=stop), "winogrande", "piqa")
    rows = count_rows(kept.models, monkeypatch)
    continued = run(kept, "winogrande", "piqa")
    assert rows == {"teacher": 0, "student": 10}
    assert continued["models"] == whole["models"] and continued["against_teacher"] == whole["against_teacher"]
    assert not list((tmp_path / "kept").glob("*.db"))
    other = replace(kept, models=(replace(kept.models[0], fingerprint="changed"),))
    run(other, "winogrande")
    assert rows["teacher"] == 10


def count_rows(eval_models: Sequence[EvalModel], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    rows = {eval_model.name: 0 for eval_model in eval_models}
    for eval_model in eval_models:
        forward = eval_model.model.forward

        def counted(*args: Any, _forward: Any = forward, _name: str = eval_model.name, **options: Any) -> Any:
            rows[_name] += len(args[0] if args else options["input_ids"])
            return _forward(*args, **options)

        monkeypatch.setattr(eval_model.model, "forward", counted)
    return rows


@pytest.mark.slow
def test_mmlu_is_a_group_of_all_subjects(eval_models: tuple[EvalModel, ...], tmp_path: Path) -> None:
    from linearize.evaluation.harness.local_files import subjects

    root = write_data(tmp_path / "data", subjects=subjects())
    ctx = EvalContext(models=eval_models[:1], data_root=root, out=tmp_path / "out")
    row = run(ctx, "mmlu:1", limit=1)["models"]["teacher"]["mmlu"]
    assert row["n"] == len(subjects()) == 57 and row["shots"] == 1
    assert row["metrics"]["acc,none"] == pytest.approx(row["score"])
    assert {"mmlu_stem", "mmlu_humanities", "mmlu_anatomy"} <= set(row["parts"])
    (root / "mmlu" / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(InputError, match=r"anatomy_dev\.csv .*cais/mmlu"):
        Tasks(tasks=("mmlu",)).check(ctx)


def test_what_cannot_run_is_said_before(ctx: EvalContext, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--skip-missing"):
        Tasks(tasks=("piqa", "race")).check(ctx)
    with pytest.raises(InputError, match="--allow-code-execution"):
        Tasks(tasks=("humaneval",)).check(ctx)
    with pytest.raises(InputError, match="no task is left"):
        Tasks(tasks=("race",)).check(replace(ctx, skip_missing=True))
    numbers = run(replace(ctx, skip_missing=True), "piqa", "race", limit=3)
    assert list(numbers["missing"]) == ["race"] and list(numbers["models"]["teacher"]) == ["piqa"]
    assert any("race was left out" in finding.text for finding in Tasks.present(numbers).findings)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'linearize\[eval\]'"):
        Tasks(tasks=("piqa",)).check(ctx)


@pytest.mark.slow
def test_humaneval_runs_where_it_may(ctx: EvalContext) -> None:
    row = run(replace(ctx, allow_code=True), "humaneval")["models"]["teacher"]["humaneval"]
    assert row["metrics"]["pass@1,create_test"] == 0.0 and row["n"] == 1


def test_without_network_and_files_it_says_so(ctx: EvalContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda **given: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(InputError, match=r"'boolq': its data set could not be loaded .*--data-root"):
        run(replace(ctx, data_root=None), "boolq")
