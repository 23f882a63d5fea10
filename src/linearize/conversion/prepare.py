"""Load and check what a conversion works on, before any work: teacher, plan, schedule, text."""

from __future__ import annotations

import logging
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from linearize.conversion.checks import (
    check_rows,
    check_stages,
    check_starts,
    checked_base,
    context_length,
    fit_length,
)
from linearize.conversion.source import TeacherSource, frozen_view, teacher_source
from linearize.conversion.text import SENSITIVITY_TOKENS, read_text, sample_batches, with_measured_tokens
from linearize.decoding.loading import is_student, pick_device
from linearize.errors import InputError
from linearize.metrics.head_scores import HeadScore, head_scores
from linearize.metrics.sensitivity import LayerScore, layer_sensitivity
from linearize.mixers import MixerConfig
from linearize.modeling import LinearizedForCausalLM, load
from linearize.modeling.io.checkpoint_checks import check_finite_outputs, check_finite_weights
from linearize.modeling.io.integrity import model_fingerprint
from linearize.modeling.io.quantized import BaseWeights
from linearize.modeling.io.student_folder import check_saving
from linearize.modeling.io.teacher import load_teacher, load_tokenizer
from linearize.modeling.probe import AttentionSite, probe
from linearize.modeling.surgery import check_plan
from linearize.modeling.truncate import truncate
from linearize.phases import phase
from linearize.recipes.plan import PlanConfig
from linearize.recipes.schema import Recipe
from linearize.training.config import Batch
from linearize.training.data.loading import PSEUDO
from linearize.training.data.train_dataset import TrainDataset
from linearize.training.student_run import unshare

FINITE_TOKENS = 64  # of held-out text, for which the teacher must give numbers
LOG = logging.getLogger("linearize")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """Everything that a conversion in memory works on, checked.

    `plan`: the mixer of each layer at the end. `steps`: the layers converted after each step of the schedule; `student`
    has those of the first step. `scores`, `heads`: the sensitivity of each layer and the score of each group of heads,
    where the plan needs them. `heldout`: batches on the teacher's device. `teacher_weights`: a fingerprint of the
    teacher's weights.

    For a draft `teacher` is its target, and `layers` are the target's layers that it has. `layer_teacher` has the
    student's layers: it is the teacher, or the teacher cut to the draft's layers, or None where the target is a
    student.
    """

    name: str
    source: TeacherSource
    recipe: Recipe
    teacher: Any
    layer_teacher: Any
    layers: Sequence[int] | None
    tokenizer: Any
    student: LinearizedForCausalLM
    plan: Sequence[MixerConfig | None]
    steps: Sequence[Sequence[int]]
    scores: Sequence[LayerScore]
    heads: Sequence[HeadScore] = ()
    text: TrainDataset
    heldout: Sequence[Batch]
    teacher_weights: str


def prepare(
    teacher_or_name: TeacherSource | str,
    recipe: Recipe,
    specs: Sequence[str],
    *,
    device: str | None = None,
    overridden: Container[str] = (),
    stage_on_cpu: bool = False,
) -> Prepared:
    """Load and check everything; writes and trains nothing.

    Args:
        teacher_or_name: the teacher (of a draft: its target). specs: of the data.
        overridden: recipe keys that the caller set: a length among them is refused beyond the teacher's context, any
            other length is cut down to it.
        stage_on_cpu: leave the models in the CPU's memory, in their own dtype, unless the teacher has to write or
            score; the caller moves them to the device.

    Raises:
        InputError: an argument that cannot be used.
    """
    source = teacher_source(teacher_or_name) if isinstance(teacher_or_name, str) else teacher_or_name
    name = source.name
    check_starts(recipe.plan)
    makes_draft = recipe.plan.depth is not None
    scored = recipe.plan.needs_scores or (recipe.plan.heads is not None and recipe.plan.heads.needs_scores)
    runs = scored or any(spec == "self" or spec.startswith(PSEUDO) for spec in specs)
    with phase(f"loading {name}"):
        teacher, tokenizer = load_for_conversion(
            source, device, recipe.seed, students=makes_draft, on_cpu=stage_on_cpu and not runs,
            base=checked_base(recipe),
        )  # fmt: skip
    recipe, notices = fit_length(recipe, context_length(teacher), overridden)
    recipe = with_measured_tokens(recipe, teacher, pick_device(device))
    layers = recipe.plan.draft_layers(teacher.config.get_text_config().num_hidden_layers)
    base = teacher if layers is None else truncate(teacher, layers)
    if isinstance(base, LinearizedForCausalLM):
        return _draft_of_student(source, recipe, teacher, tokenizer, base, layers or [], specs, notices)
    sites = probe(base)
    scores: list[LayerScore] = []
    plan, steps, untouched = resolve_plan(recipe.plan, sites, base, scores)
    student = _student(base, name, plan, recipe.seed)
    check_stages(recipe, student, base, tokenizer)
    check_saving(student, tokenizer)
    text, heldout = read_text(teacher, tokenizer, recipe.data, specs)
    if not stage_on_cpu:
        check_finite_outputs(teacher, name, heldout[0]["input_ids"][:1, :FINITE_TOKENS])
    check_rows(recipe, text, len(steps))
    if recipe.plan.needs_scores:
        assert recipe.plan.mixer is not None
        scores = layer_sensitivity(base, recipe.plan.mixer, sample_batches(recipe, text, teacher, SENSITIVITY_TOKENS))
        plan, steps, untouched = resolve_plan(recipe.plan, sites, base, scores)
    heads: Sequence[HeadScore] = ()
    if recipe.plan.heads is not None and recipe.plan.heads.needs_scores:
        heads = head_scores(teacher, tokenizer, seed=recipe.seed).heads
        plan, steps, untouched = resolve_plan(recipe.plan, sites, base, scores, heads)
    if scores or heads or len(steps) > 1:
        first = [mixer if layer in steps[0] else None for layer, mixer in enumerate(plan)]
        student = _student(base, name, first, recipe.seed)
    for notice in notices + untouched:
        LOG.warning(notice)
    return Prepared(
        name=name, source=source, recipe=recipe,
        teacher=teacher, layer_teacher=base, layers=layers, tokenizer=tokenizer,
        student=student, plan=plan, steps=steps, scores=scores, heads=heads, text=text, heldout=heldout,
        teacher_weights=model_fingerprint(teacher),
    )  # fmt: skip


def _draft_of_student(
    source: TeacherSource,
    recipe: Recipe,
    target: Any,
    tokenizer: Any,
    draft: LinearizedForCausalLM,
    layers: Sequence[int],
    specs: Sequence[str],
    notices: Sequence[str],
) -> Prepared:
    """Prepare a draft of a target that is a student: it keeps the mixers of the target's layers."""
    if (mixer := recipe.plan.mixer) is not None:
        raise InputError(
            f"plan.mixer {mixer.name} given, but {source.name} is a student, "  # type: ignore[attr-defined]
            "whose draft keeps the mixers of its layers: set plan.mixer to null"
        )
    draft.config.teacher_name = source.name
    unshare(draft, target, draft.mixer_parameters())
    check_stages(recipe, draft, target, tokenizer, converted=False)
    check_saving(draft, tokenizer)
    text, heldout = read_text(target, tokenizer, recipe.data, specs)
    check_rows(recipe, text, 1)
    for notice in notices:
        LOG.warning(notice)
    return Prepared(
        name=source.name, source=source, recipe=recipe,
        teacher=target, layer_teacher=None, layers=layers, tokenizer=tokenizer,
        student=draft, plan=draft.config.mixers(), steps=[[]], scores=[], text=text, heldout=heldout,
        teacher_weights=model_fingerprint(target),
    )  # fmt: skip


def resolve_plan(
    plan: PlanConfig,
    sites: Sequence[AttentionSite],
    teacher: Any,
    scores: Sequence[LayerScore],
    heads: Sequence[HeadScore] = (),
) -> tuple[list[MixerConfig | None], list[list[int]], list[str]]:
    """The mixer of each layer, the steps of the schedule, and warnings about layers that stay as they are.

    Without `scores` or `heads`, a plan that chooses layers or heads by them gets any choice of the right size.
    """
    planned = plan.resolve(len(sites), [score.kl for score in scores] or [0.0] * len(sites))
    applied = check_plan(planned, sites, teacher.config.model_type)
    counts = [site.far_groups for site in sites]
    by_place = {(score.layer, score.group): -score.rank for score in heads}
    applied = plan.with_heads(applied, counts, by_place or None)
    kept = [i for i, mixer in enumerate(planned) if mixer is not None and applied[i] is None]
    notices = [f"layers {kept} keep their own attention: the teacher limits it to the mixer's window already"] * bool(
        kept
    )
    return applied, _steps(plan, planned, applied), notices


def _student(teacher: Any, name: str, plan: Sequence[MixerConfig | None], seed: int) -> LinearizedForCausalLM:
    torch.manual_seed(seed)
    return LinearizedForCausalLM.from_teacher(teacher, plan, teacher_name=name)


def _steps(plan: PlanConfig, planned: Sequence[Any], applied: Sequence[Any]) -> list[list[int]]:
    """The schedule's steps without the layers that stay as they are; at least one."""
    converted = [layer for layer, mixer in enumerate(planned) if mixer is not None]
    left = [[i for i in step if applied[i] is not None] for step in plan.steps(converted, len(planned))]
    return [step for i, step in enumerate(left) if step and (i == 0 or step != left[i - 1])] or [[]]


def load_for_conversion(
    source: TeacherSource,
    device: str | None,
    seed: int,
    *,
    students: bool = False,
    on_cpu: bool = False,
    base: BaseWeights = "full",
) -> tuple[Any, Any]:
    """Load teacher and tokenizer to the device, or to the CPU first (`on_cpu`); in fp32 where the device is a CPU.

    Where `students` are allowed, the teacher may be one of ours, frozen. Of a teacher in memory it is a view, and
    `device` does not move it. Raises InputError: also where it gives NaN.
    """
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    target = str(pick_device(device))
    placement = None if source.device_map is not None else "cpu" if on_cpu else target
    halves = (torch.float16, torch.bfloat16)
    tokenizer: Any = source.tokenizer
    if source.model is not None:
        if isinstance(source.model, LinearizedForCausalLM) and not students:
            raise InputError("the model in memory is a student already: give the teacher, with softmax attention")
        as_fp32 = source.model.device.type == "cpu" and source.model.dtype in halves
        teacher: Any = frozen_view(source.model, as_fp32=as_fp32)
    elif students and is_student(source.path):
        teacher = load(source.path, dtype=source.dtype, device=placement, device_map=source.device_map)
        teacher.requires_grad_(False)
        tokenizer = load_tokenizer(source.path)
    else:
        dtype = torch.float32 if base != "full" and target == "cpu" else source.dtype
        teacher, tokenizer = load_teacher(
            source.path, dtype=dtype, device=placement, trust_remote_code=source.trust_remote_code, base=base,
            device_map=source.device_map,
        )  # fmt: skip
    if teacher.device.type == "cpu" and target == "cpu" and teacher.dtype in halves:
        teacher = teacher.float()
    check_finite_weights(teacher, source.name)
    check_finite_outputs(teacher, source.name)
    return teacher, tokenizer
