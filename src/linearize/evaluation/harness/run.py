"""The tasks of one evaluation: what they share, what is kept between them, lm-eval's own command for each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linearize.evaluation.context import EvalContext, EvalModel
from linearize.evaluation.harness.answers import Answers
from linearize.evaluation.harness.catalogue import Entry
from linearize.evaluation.harness.folder import DATA, FUNCTIONS
from linearize.evaluation.harness.model import Pairs, TooLongError, choose_batch, harness_model
from linearize.evaluation.harness.outcome import Outcome, outcomes, write_samples
from linearize.evaluation.harness.runner import command, manager_for, measure
from linearize.evaluation.result_cache import ResultCache

ROUND = 64  # tokens
NO_TRAINING = "few-shot examples come from the measured file (the measured item left out): there is no training split"


@dataclass(frozen=True, kw_only=True)
class Run:
    """`length`: the longest row in tokens; `batch`: rows at a time; `limit`: items per task; `longer`: the rows of
    tasks with an answer longer than that."""

    ctx: EvalContext
    folder: Path
    length: int
    batch: int
    limit: int | None
    longer: dict[str, int] = field(default_factory=dict)

    @classmethod
    def prepare(cls, ctx: EvalContext, folder: Path, limit: int | None) -> Run:
        """Choose the length and the batch, the same for all models."""
        length = longest_row(ctx.models)
        models = [[c.fingerprint, c.model.device.type, str(c.model.dtype)] for c in ctx.models]
        key = {"section": "tasks-batch", "models": models, "length": length}
        kept = ctx.results if all(c.fingerprint for c in ctx.models) else ResultCache()
        batch = kept.result(key, lambda: choose_batch(ctx.models, length))
        return cls(ctx=ctx, folder=folder, length=length, batch=batch, limit=limit)

    def outcomes(self, entry: Entry, eval_model: EvalModel, pairs: Pairs) -> dict[str, Outcome]:
        """One task on one model; what was kept of it is taken up."""
        key = self._key(entry, eval_model)
        kept = self.ctx.results if eval_model.fingerprint else ResultCache()

        def measured() -> dict[str, Any]:
            path, length = kept.path(f"answers-{_digest(key)}.db"), self.length
            try:
                found = self._measured(entry, eval_model, pairs, path, length)
            except TooLongError as error:  # only longer rows can score such an answer whole
                length = -(-error.tokens // ROUND) * ROUND
                found = self._measured(entry, eval_model, pairs, path, length)
            if path is not None:
                path.unlink(missing_ok=True)
            return {"length": length, "outcomes": found}

        result = kept.result(key, measured)
        if result["length"] != self.length:
            self.longer[entry.task] = result["length"]
        found: dict[str, Outcome] = result["outcomes"]
        return found

    def _measured(
        self, entry: Entry, eval_model: EvalModel, pairs: Pairs, path: Path | None, length: int
    ) -> dict[str, Outcome]:
        what = f"{entry.task}, {eval_model.name}: requests"
        model = harness_model(eval_model, batch=self.batch, max_length=length, pairs=pairs)
        model.answers = Answers(path, lambda done, asked: self.ctx.progress(what, done, asked))
        try:
            found = measure(
                entry, model, manager_for(entry, self.folder), limit=self.limit, seed=self.ctx.seed,
                allow_code=self.ctx.allow_code, tokens=self._tokens(entry),
            )  # fmt: skip
        finally:
            model.answers.close()
        if self.ctx.out is not None:
            write_samples(self.ctx.out / "samples" / f"{entry.task}.{eval_model.name}.jsonl", found)
        choices = {task: config["output_type"] == "multiple_choice" for task, config in found["configs"].items()}
        return outcomes(entry, found, choices)

    def facts(self, chosen: Sequence[Entry]) -> dict[str, Any]:
        """How the numbers came about."""
        import lm_eval

        first = self.ctx.models[0]
        return {
            "lm_eval": lm_eval.__version__,
            "source": str(self.ctx.data_root) if self.ctx.data_root is not None else "Hugging Face Hub",
            "batch": self.batch,
            "max_length": self.length,
            "limit": self.limit,
            "notes": {entry.task: note for entry in chosen if (note := self._note(entry))},
            "commands": {entry.task: self._command(entry, first) for entry in chosen},
        }

    def _note(self, entry: Entry) -> str:
        known, notes = entry.known, []
        if entry.own is not None:
            notes.append(f"as defined in {entry.own}")
        if entry.task in self.longer:
            notes.append(
                f"rows of {self.longer[entry.task]} tokens: an answer is longer than the model's {self.length}"
            )
        if known is None:
            return "; ".join(notes)
        local = self.ctx.data_root is not None
        notes += [note for note in (known.note, known.local_note if local else "") if note]
        if local and not known.own_shots and entry.shots:
            notes.append(NO_TRAINING)
        if (tokens := self._tokens(entry)) is not None:
            notes.append(f"answers cut at {tokens} tokens, not {known.generates}: the model's rows are short")
        return "; ".join(notes)

    def _tokens(self, entry: Entry) -> int | None:
        """How much is generated, where the definition's number leaves less than half a row for the prompt."""
        half = self.length // 2
        return half if entry.known is not None and entry.known.generates > half else None

    def _command(self, entry: Entry, eval_model: EvalModel) -> str:
        model = eval_model.model
        settings = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "attn_implementation": model.config._attn_implementation,
            "max_length": self.longer.get(entry.task, self.length),
        }
        return command(
            entry, path=eval_model.path, settings=settings, batch=self.batch, limit=self.limit,
            seed=self.ctx.seed, tokens=self._tokens(entry), folder=self.folder, device=model.device.type,
        )  # fmt: skip

    def _key(self, entry: Entry, eval_model: EvalModel) -> dict[str, Any]:
        """Everything that an outcome depends on."""
        import lm_eval

        return {
            "section": "tasks",
            "task": entry.task,
            "shots": entry.shots,
            "limit": self.limit,
            "model": eval_model.fingerprint,
            "dtype": str(eval_model.model.dtype),
            "device": eval_model.model.device.type,
            "batch": self.batch,
            "max_length": self.length,
            "seed": self.ctx.seed,
            "lm_eval": lm_eval.__version__,
            "definition": self._definition(entry),
        }

    def _definition(self, entry: Entry) -> str:
        """A digest of the files that define the task."""
        names = [f"{FUNCTIONS}.py", f"{entry.task}.yaml", f"{DATA}/{entry.task}.*"]
        names += [f"{entry.task}_*.yaml", f"{DATA}/{entry.task}_*"] if entry.task == "mmlu" else []
        found = hashlib.sha256()
        if entry.own is not None:  # all of its files, since a definition includes others; large data by size and time
            for path in sorted(path for path in entry.own.rglob("*") if path.is_file()):
                small = path.suffix in (".yaml", ".py")
                told = path.read_bytes() if small else str((path.stat().st_size, path.stat().st_mtime_ns)).encode()
                found.update(str(path.relative_to(entry.own)).encode() + told)
            return found.hexdigest()[:20]
        for path in sorted({path for name in names for path in self.folder.glob(name)}):
            found.update(path.name.encode() + path.read_bytes())
        return found.hexdigest()[:20]


def longest_row(eval_models: Sequence[EvalModel]) -> int:
    """The tokens that every model can take, found as lm-eval does for a model alone."""
    from lm_eval.models.utils import resolve_max_length

    return int(min(resolve_max_length(c.model.config, c.tokenizer, default=2048) for c in eval_models))


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
