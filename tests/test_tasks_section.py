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
from task_files import DEFINITIONS, write_data

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel
from linearize.evaluation.numbers import ResultCache
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
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = write_data(tmp_path / "data")
    monkeypatch.setenv("LINEARIZE_EVAL_DATA", str(root))
    return root


@pytest.fixture
def ctx(eval_models: tuple[EvalModel, ...], data: Path, tmp_path: Path) -> EvalContext:
    return EvalContext(models=eval_models, include_path=DEFINITIONS, out=tmp_path / "out")


def run(ctx: EvalContext, *tasks: str, **fields: Any) -> dict[str, Any]:
    section = Tasks(tasks=tasks, **fields)
    section.check(ctx)
    numbers: dict[str, Any] = json.loads(json.dumps(section.run(ctx)))
    return numbers


def by_lm_eval(numbers: dict[str, Any], task: str, path: str, tokens: int | None) -> dict[str, Any]:
    """lm-eval alone, with its own model class and nothing of ours."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    output = simple_evaluate(
        "hf",
        model_args={"pretrained": path},
        tasks=[task],
        num_fewshot=numbers["models"]["teacher"][task]["shots"],
        batch_size=numbers["batch"],
        device="cpu",
        gen_kwargs={"max_gen_toks": tokens} if tokens else None,
        task_manager=TaskManager(include_path=str(DEFINITIONS), include_defaults=False),
    )
    assert output is not None
    return dict(output)


@pytest.mark.parametrize(
    ("task", "shots", "items", "tokens"),
    [("piqa", 0, 9, None), ("winogrande", 2, 5, None), ("cruxeval", 2, 3, 80), ("gsm8k", 1, 5, 80)],
)
def test_the_teachers_numbers_are_lm_evals(ctx: EvalContext, task: str, shots: int, items: int, tokens: int) -> None:
    ctx = replace(ctx, models=ctx.models[:1])
    numbers = run(ctx, f"{task}:{shots}")
    assert ctx.out is not None
    ours = numbers["models"]["teacher"][task]
    reference = by_lm_eval(numbers, task, ctx.models[0].path, tokens)
    assert ours["metrics"] == {key: value for key, value in reference["results"][task].items() if "," in key}
    lines = (ctx.out / "samples" / f"{task}.teacher.jsonl").read_text().split("\n")
    own_responses = [json.loads(line)["resps"] for line in lines if line]
    theirs = json.loads(json.dumps([sample["resps"] for sample in reference["samples"][task]]))
    assert own_responses == theirs and len({str(response) for response in own_responses}) > 1  # to the last bit
    assert ours["score"] == pytest.approx(ours["metrics"][ours["metric"]])
    assert (ours["n"], ours["shots"], ours["chance"]) == (items, shots, 0.0 if tokens else 0.5)
    command = numbers["commands"][task]
    assert f"--tasks {task} --include_path {DEFINITIONS} --num_fewshot {shots}" in command
    assert ("max_gen_toks=80" in command) == ("not 256" in numbers["notes"].get(task, "")) == bool(tokens)
    assert ("without the item that is asked" in numbers["notes"].get(task, "")) == (task in ("winogrande", "gsm8k"))


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
    assert [json.loads(line)["doc"]["query"] for line in lines[:2]] == [item["query"] for item in PIQA[:2]]


@pytest.mark.slow
def test_an_answer_longer_than_the_models_rows_gets_longer_ones(ctx: EvalContext, data: Path) -> None:
    """lm-eval alone stops with an assertion there; with the rows of our command it gives the same numbers."""
    assert ctx.out is not None
    path = data / "multiple_choice" / "piqa.jsonl"
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


def test_generation_in_a_padded_batch_is_that_alone(ctx: EvalContext) -> None:
    from lm_eval.api.instance import Instance

    from linearize.evaluation.harness.model import harness_model

    prompts = ["a", "some longer prompt", "the one that is by far the longest of them all"]
    for eval_model in ctx.models:
        texts = []
        for batch in (1, 3):
            model = harness_model(eval_model, batch=batch, max_length=LENGTH)
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
    assert not list((tmp_path / "kept").glob("answers-*"))
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
def test_mmlu_is_a_group_of_all_subjects(ctx: EvalContext, data: Path) -> None:
    subjects = [path.stem.removeprefix("mmlu_") for path in (DEFINITIONS / "mmlu").glob("mmlu_*.yaml")]
    write_data(data, subjects=subjects)
    row = run(replace(ctx, models=ctx.models[:1]), "mmlu:1", limit=1)["models"]["teacher"]["mmlu"]
    assert row["n"] == len(subjects) == 57 and row["shots"] == 1
    assert row["metrics"]["acc,none"] == pytest.approx(row["score"])
    assert {"mmlu_stem", "mmlu_humanities", "mmlu_anatomy"} <= set(row["parts"])


def test_what_cannot_run_is_refused_before(ctx: EvalContext, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--allow-code-execution"):
        Tasks(tasks=("humaneval",)).check(ctx)
    with pytest.raises(InputError, match="--allow-code-execution"):
        Tasks(tasks=("humaneval",)).check(replace(ctx, include_path=None))
    with pytest.raises(InputError, match=r"'openbookqa'.*openbook_qa\.jsonl does not exist"):
        run(ctx, "openbookqa")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'linearize\[eval\]'"):
        Tasks(tasks=("piqa",)).check(ctx)


@pytest.mark.slow
def test_humaneval_runs_where_it_may(ctx: EvalContext) -> None:
    numbers = run(replace(ctx, allow_code=True), "humaneval")
    row = numbers["models"]["teacher"]["humaneval"]
    assert row["metrics"]["pass@1,create_test"] == 0.0 and row["n"] == 1
    assert "--confirm_run_unsafe_code" in numbers["commands"]["humaneval"]


def test_without_network_and_definitions_it_fails_with_one_line(
    ctx: EvalContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda **kwargs: (_ for _ in ()).throw(ConnectionError("no network")))
    with pytest.raises(InputError, match=r"'boolq': .*--include-path"):
        run(replace(ctx, include_path=None), "boolq")


def test_lm_eval_leaves_no_trace(ctx: EvalContext) -> None:
    """Its log levels, bars, environment and seeds are back as they were, also after an error."""
    import logging
    import os
    import random

    import lm_eval.models.huggingface as models
    import tqdm

    from linearize.evaluation.harness.model import isolated

    def state() -> list[Any]:
        return [
            logging.root.manager.disable,
            models.tqdm,
            tqdm.tqdm,
            dict(os.environ),
            random.getstate(),
            torch.get_rng_state().tolist(),
        ]

    before = state()
    with pytest.raises(KeyError), isolated(allow_code=True):
        assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
        random.seed(3), torch.manual_seed(3)
        raise KeyError
    assert state() == before
