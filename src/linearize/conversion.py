"""`linearize convert`: teacher, recipe and data in, one stage after the other, student folder out."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from linearize.decoding.loading import pick_device
from linearize.errors import InputError
from linearize.evaluation.card import model_card
from linearize.evaluation.language_modeling import branch_ablation, held_out_report, loss_only
from linearize.evaluation.plots import plot_layer_error, plot_stages
from linearize.evaluation.report import ConversionReport, StageReport, build_report, provenance, write_report
from linearize.files import atomic_folder, check_free
from linearize.modeling import LinearizedForCausalLM, load
from linearize.modeling.save import save_student
from linearize.modeling.teacher import load_teacher
from linearize.ops.window_linear.window import ring_slots
from linearize.recipes.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from linearize.training.config import Batch, StageConfig
from linearize.training.data import PackedRows, batches, document_rows, load_documents, pack, split
from linearize.training.hardware import bf16_pays
from linearize.training.loop import StageResult, run_stage
from linearize.training.progress import Progress, make_progress
from linearize.training.sampling import self_sampler
from linearize.training.stages.attention_transfer import AttentionTransfer, AttentionTransferConfig
from linearize.training.tracking import make_tracker

EVALUATION_BATCH = 8
LOG = logging.getLogger("linearize")


def convert(
    teacher: str | os.PathLike[str],
    *,
    data: Sequence[str | os.PathLike[str]] | str,
    out: str | os.PathLike[str],
    recipe: str | Recipe = DEFAULT_RECIPE,
    overrides: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    device: str | None = None,
    track: Sequence[str] = (),
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> LinearizedForCausalLM:
    """Convert a teacher into a student and write the student's folder; returns the student, loaded from it.

    Everything is checked before any work. Killed at any point, the same call continues from `.OUT.run` beside the
    folder, which is removed at the end. A recipe's `data.length` beyond the teacher's context becomes that context,
    unless `overrides` ask for it.

    Args:
        teacher: folder or Hub name. data: SPECs (files, Hub data sets, `self`). out: folder that must not exist
        unless `overwrite`.
        recipe: a name, a YAML file or a `Recipe`. overrides: dotted recipe keys.
    Raises:
        InputError: anything given that cannot be used; RuntimeError: training diverged; OSError: the disk is full.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    chosen = chosen.override(dict(overrides or {}))
    fixed_length = bool({"data", "data.length"} & set(overrides or {}))
    final = Path(out).expanduser().resolve()
    check_free(final, overwrite)
    specs = [data] if isinstance(data, str) else [str(spec) for spec in data]
    conversion = _prepare(
        str(teacher), chosen, specs, device=device, trust_remote_code=trust_remote_code, fixed_length=fixed_length
    )
    work = _work_folder(final)
    report = conversion.run(work, progress or make_progress(), track)
    with atomic_folder(final, overwrite) as folder:
        conversion.write(folder, report)
        if (work / "log").is_dir():
            shutil.copytree(work / "log", folder / "log")
    shutil.rmtree(work, ignore_errors=True)
    return load(final, device=device)


def _work_folder(final: Path) -> Path:
    """Where checkpoints and the log lie until the student is whole: beside it."""
    work = final.parent / f".{final.name}.run"
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{final}: cannot create the output folder ({error.strerror}); give another one") from error
    return work


@dataclass(eq=False)
class Conversion:
    """Everything that a conversion works on."""

    name: str
    recipe: Recipe
    specs: list[str]
    teacher: Any
    tokenizer: Any
    student: LinearizedForCausalLM
    train: PackedRows
    heldout: list[Batch]

    def run(self, work: Path, progress: Progress, track: Sequence[str]) -> ConversionReport:
        """All stages, measured before and after each; returns the report."""
        identity = {
            "teacher": self.name,
            "plan": self.student.config.plan,
            "data": self._fingerprint(),
            "seed": self.recipe.seed,
        }
        tracker = make_tracker(work / "log", track)
        swap = loss = self._loss()
        errors = {"swap": self._layer_errors()}
        stages: list[StageReport] = []
        before: dict[str, Any] = {}
        for number, stage in enumerate(self.recipe.stages):
            if reason := self._why_skipped(stage):
                LOG.warning("stage %d (%s) is skipped: %s", number, stage.name, reason)
                continue
            key = f"{number}-{stage.name}"
            result = self._stage(stage, work / key, {**identity, "before": dict(before)}, key, progress, tracker)
            before[key] = stage.model_dump(mode="json")
            after = self._loss()
            stages.append(_stage_report(stage, result, loss, after))
            loss, errors[key] = after, self._layer_errors()
        held_out = held_out_report(self.student, self.teacher, self.heldout)
        return build_report(
            teacher=self.name,
            recipe=self.recipe.name,
            data=self.specs,
            swap_loss=swap,
            stages=stages,
            held_out=held_out,
            ablation=self._ablation(),
            layer_error={k: v for k, v in errors.items() if v},
            provenance=provenance(seed=self.recipe.seed),
        )

    def _why_skipped(self, stage: StageConfig) -> str | None:
        if stage.tokens == 0:
            return "its tokens are 0"
        if isinstance(stage, AttentionTransferConfig) and not self.student.mixer_parameters():
            return "no mixer of this plan has parameters to train"
        return None

    def write(self, folder: Path, report: ConversionReport) -> None:
        """Weights, tokenizer, recipe, report, plots and model card into an empty folder."""
        save_student(self.student, self.tokenizer, folder)
        recipe = self.recipe.to_yaml()
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
        write_report(report, folder)
        (folder / "README.md").write_text(model_card(report, recipe, self.student.config.to_dict()), encoding="utf-8")
        plot_stages(report, folder / "plots")
        if report.layer_error:
            plot_layer_error(report.layer_error, folder / "plots")

    def _stage(
        self, stage: StageConfig, folder: Path, identity: dict[str, Any], key: str, progress: Progress, tracker: Any
    ) -> StageResult:
        torch.manual_seed(self.recipe.seed + stage.seed)
        if stage.precision == "bf16" and not bf16_pays(self.student.device):
            note(f"{key}: this CPU has no bf16 units, so bf16 would be slower: computing in fp32")
            stage = stage.model_copy(update={"precision": "fp32"})
        run = stage.build(self.student, self.teacher)
        device = self.student.device

        def stream(start: int) -> Any:
            for batch in batches(self.train, stage.batch, stage.seed, start_step=start):
                yield {name: x.to(device) for name, x in batch.items()}

        run.calibrate(next(stream(0)))
        return run_stage(
            run, stage, stream, self.heldout, length=self.train.length, checkpoint_dir=folder, identity=identity,
            name=key,
            progress=progress, tracker=tracker,
        )  # fmt: skip

    def _loss(self) -> float:
        return loss_only(self.student, self.heldout)[0]

    def _layer_errors(self) -> list[float]:
        if not self.student.mixer_parameters():
            return []
        probe = AttentionTransfer(AttentionTransferConfig(tokens=0, lr=1.0), self.student)
        errors = probe.layer_errors(self.heldout[0])
        probe.finish()
        return errors

    def _ablation(self) -> Any:
        windows = [
            mixer for mixer in self.student.config.mixers() if mixer is not None and hasattr(mixer, "feature_map")
        ]
        reach = max((ring_slots(m.window, m.window_shape) + 1 for m in windows if m.window), default=0)  # type: ignore[attr-defined]
        return branch_ablation(self.student, self.heldout, window=reach, teacher=self.teacher) if reach else None

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for rows in (self.train.input_ids, self.train.labels, *(batch["input_ids"] for batch in self.heldout)):
            digest.update(rows.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def _prepare(
    name: str,
    recipe: Recipe,
    specs: list[str],
    *,
    device: str | None,
    trust_remote_code: bool,
    fixed_length: bool,
) -> Conversion:
    """Load and check everything; nothing has been written or trained when this returns."""
    torch.set_flush_denormal(True)
    torch.manual_seed(recipe.seed)
    where = str(pick_device(device))
    teacher, tokenizer = load_teacher(name, device=where, trust_remote_code=trust_remote_code)
    if where == "cpu" and teacher.dtype in (torch.float16, torch.bfloat16):
        teacher = teacher.float()
    recipe = _fit_length(recipe, teacher.config.get_text_config(), fixed_length)
    plan = recipe.plan.resolve(teacher.config.get_text_config().num_hidden_layers)
    student = LinearizedForCausalLM.from_teacher(teacher, plan, teacher_name=name)
    if kept := [i for i, mixer in enumerate(plan) if mixer is not None and student.config.plan[i] is None]:
        LOG.warning("layers %s keep their own attention: the teacher limits it to the mixer's window already", kept)
    length = recipe.data.length
    documents = load_documents(
        specs, tokenizer, sample=self_sampler(teacher, tokenizer, recipe.data), answer_only=recipe.data.answer_only
    )
    parts = split(documents, recipe.data)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    train = pack(parts.train, length, pad_token_id=pad, keep_whole=recipe.data.keep_whole)
    rows = document_rows(parts.heldout, length, pad_token_id=pad)
    heldout = [{k: x.to(where) for k, x in batch.items()} for batch in rows.in_order(EVALUATION_BATCH)]
    return Conversion(name, recipe, specs, teacher, tokenizer, student, train, heldout)


def note(line: str) -> None:
    """One line for people, on stderr."""
    print(f"linearize: {line}", file=sys.stderr)


def _fit_length(recipe: Recipe, config: Any, fixed: bool) -> Recipe:
    """The recipe with rows that fit into the teacher's context; refuses a length that was asked for and does not."""
    length, limit = recipe.data.length, getattr(config, "max_position_embeddings", None)
    if limit is None or length <= limit:
        return recipe
    if fixed:
        raise InputError(
            f"data.length {length} is beyond the teacher's context {limit}: set data.length to at most {limit}"
        )
    LOG.warning("data.length is %d: the recipe's %d is beyond the teacher's context", limit, length)
    return recipe.override({"data.length": limit})


def _stage_report(stage: StageConfig, result: StageResult, before: float, after: float) -> StageReport:
    every = max(1, len(result.losses) // 200)
    details = {
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped_early": result.stopped_early,
        "losses": [list(x) for x in result.losses[::every]],
        "heldout": [list(x) for x in result.heldout],
    }
    return StageReport(
        name=stage.name,
        loss_before=before,
        loss_after=after,
        tokens=result.tokens,
        trainable_parameters=result.trainable_parameters,
        seconds=round(result.seconds, 2),
        details=details,
    )
