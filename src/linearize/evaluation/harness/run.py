"""The tasks of one evaluation by lm-eval's own runner: what they share, what an interrupted run keeps, its commands."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.decoding.loading import is_student
from linearize.evaluation.context import EvalContext, EvalModel
from linearize.evaluation.harness.definitions import LoadedTask
from linearize.evaluation.harness.model import TooLongError, choose_batch, harness_model, isolated, longest_row
from linearize.evaluation.harness.outcome import Outcome, Results, outcomes, write_samples
from linearize.evaluation.numbers import NumbersModel, ResultCache

BOOTSTRAP = 1000  # draws for metrics without a formula for their error (perplexity); lm-eval's command takes 100,000
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234}  # lm-eval's own
FEW_SHOT_SEED = 1234
ROUND = 64  # tokens


class Measured(NumbersModel):
    """A task on a model, in rows of at most `max_length` tokens: an outcome for each row of the report."""

    max_length: int
    outcomes: dict[str, Outcome]


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all tasks and models share. `length`: the longest row in tokens; `batch`: rows at a time; `limit`: items."""

    ctx: EvalContext
    length: int
    batch: int
    limit: int | None

    @classmethod
    def prepare(cls, ctx: EvalContext, limit: int | None) -> Run:
        """Choose the length and the batch, the same for all models."""
        length = longest_row(ctx.models)
        models = [[m.fingerprint, m.model.device.type, str(m.model.dtype)] for m in ctx.models]
        key = {"section": "tasks-batch", "models": models, "length": length}
        cache = ctx.results if all(m.fingerprint for m in ctx.models) else ResultCache()
        batch = cache.result(key, lambda: choose_batch(ctx.models, length))
        return cls(ctx=ctx, length=length, batch=batch, limit=limit)

    def measure(self, task: LoadedTask, eval_model: EvalModel) -> Measured:
        """Measure one task on one model, or continue where an interrupted run stopped."""
        key = self._key(task, eval_model)
        cache = self.ctx.results if eval_model.fingerprint else ResultCache()
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]

        def measured(length: int) -> dict[str, Any]:
            answers = cache.path(f"answers-{name}-{length}")
            results = self._evaluate(task, eval_model, length, answers)
            for path in answers.parent.glob(f"answers-{name}-*") if answers is not None else ():
                path.unlink()
            if self.ctx.out is not None:
                write_samples(self.ctx.out / "samples" / f"{task.spec.task}.{eval_model.name}.jsonl", results)
            measured_outcomes = outcomes(
                task.spec.task, results, lambda text: len(eval_model.tokenizer(text)["input_ids"])
            )
            return Measured(max_length=length, outcomes=measured_outcomes).to_json()

        def fresh() -> dict[str, Any]:
            try:
                return measured(self.length)
            except TooLongError as error:  # only longer rows can score such an answer whole
                return measured(-(-error.tokens // ROUND) * ROUND)

        return Measured.model_validate(cache.result(key, fresh))

    def _evaluate(self, task: LoadedTask, eval_model: EvalModel, length: int, answers: Path | None) -> Results:
        """What lm-eval's `simple_evaluate` returns, items included; `answers`: where it keeps those to requests."""
        from lm_eval import simple_evaluate

        what = f"{task.spec.task}, {eval_model.name}: requests"
        cut = self.new_tokens(task)
        model = harness_model(eval_model, batch=self.batch, max_length=length)
        try:
            with isolated(lambda done, total: self.ctx.progress(what, done, total), allow_code=self.ctx.allow_code):
                results: Results | None = simple_evaluate(
                    model,
                    tasks=task.members,
                    task_manager=task.spec.manager,
                    num_fewshot=task.spec.shots,
                    limit=self.limit,
                    bootstrap_iters=BOOTSTRAP,
                    gen_kwargs={"max_gen_toks": cut} if cut else None,
                    confirm_run_unsafe_code=self.ctx.allow_code,
                    fewshot_random_seed=FEW_SHOT_SEED + self.ctx.seed,
                    use_cache=str(answers) if answers is not None else None,
                    **SEEDS,
                )
        finally:
            if (database := model.cache_hook.dbdict) is not None:
                database.close()
        assert results is not None
        return results

    def new_tokens(self, task: LoadedTask) -> int | None:
        """Tokens generated, where the definition's number leaves less than half a row for the prompt; else None."""
        half = self.length // 2
        return half if task.new_tokens > half else None

    def note(self, task: LoadedTask, length: int) -> str:
        """What a reader of the task's scores should know; `length`: of the rows that it took."""
        notes = task.notes
        if length != self.length:
            notes.append(f"rows of {length} tokens: an answer is longer than the model's {self.length}")
        if (cut := self.new_tokens(task)) is not None:
            notes.append(f"answers cut at {cut} tokens, not {task.new_tokens}: the model's rows are short")
        return "; ".join(notes)

    def command(self, task: LoadedTask, eval_model: EvalModel, length: int) -> str:
        """lm-eval's own command for the same numbers; for a student with linearize imported."""
        model, spec, seed = eval_model.model, task.spec, self.ctx.seed
        settings = {
            "pretrained": eval_model.path,
            "dtype": eval_model.dtype,
            "attn_implementation": model.config._attn_implementation,
            "max_length": length,
        }
        student = ["python", "-m", "linearize.lm_eval", "--model", "linearize"]
        words = student if is_student(eval_model.path) else ["lm_eval", "--model", "hf"]
        words += ["--model_args", ",".join(f"{name}={value}" for name, value in settings.items()), "--tasks", spec.task]
        words += ["--include_path", str(spec.folder)] if spec.folder is not None else []
        words += ["--num_fewshot", str(spec.shots)] if spec.shots is not None else []
        words += ["--limit", str(self.limit)] if self.limit is not None else []
        words += ["--gen_kwargs", f"max_gen_toks={cut}"] if (cut := self.new_tokens(task)) else []
        words += ["--confirm_run_unsafe_code"] if task.executes_code else []
        words += ["--seed", f"0,1234,1234,{FEW_SHOT_SEED + seed}"] if seed else []
        command = shlex.join([*words, "--batch_size", str(self.batch), "--device", model.device.type])
        return f"HF_ALLOW_CODE_EVAL=1 {command}" if task.executes_code else command

    def _key(self, task: LoadedTask, eval_model: EvalModel) -> dict[str, Any]:
        """Everything that an outcome depends on."""
        import lm_eval

        return {
            "section": "tasks",
            "fields": sorted(Outcome.model_fields),
            "task": task.spec.task,
            "definition": [str(task.spec.folder), task.digest],
            "shots": task.spec.shots,
            "limit": self.limit,
            "model": eval_model.fingerprint,
            "dtype": str(eval_model.model.dtype),
            "device": eval_model.model.device.type,
            "batch": self.batch,
            "max_length": self.length,
            "seed": self.ctx.seed,
            "lm_eval": lm_eval.__version__,
        }
