"""What a conversion works on, loaded and checked before any work: teacher, plan, schedule, text."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from linearize.conversion.base_weights import checked_base
from linearize.decoding.loading import is_student, pick_device
from linearize.errors import InputError
from linearize.metrics.sensitivity import LayerScore, layer_sensitivity
from linearize.mixers import AttentionShape, MixerConfig
from linearize.mixers.layer_mixer import LayerMixer, LayerMixerConfig
from linearize.modeling import LinearizedForCausalLM, load
from linearize.modeling.document_probe import keeps_documents_apart
from linearize.modeling.io.checksums import model_fingerprint
from linearize.modeling.io.finite import check_finite_outputs, check_finite_weights
from linearize.modeling.io.quantized import BaseWeights
from linearize.modeling.io.student_folder import check_saving
from linearize.modeling.io.teacher import load_teacher, load_tokenizer
from linearize.modeling.surgery import AttentionSite, check_plan, probe
from linearize.modeling.truncate import truncate
from linearize.recipes.plan import PlanConfig
from linearize.recipes.recipe import DEFAULT_RECIPE, Recipe, load_recipe
from linearize.training.config import Batch
from linearize.training.data.loading import PSEUDO, DataConfig, document_rows, load_documents, split
from linearize.training.data.pseudo_labels import pseudo_labeller
from linearize.training.data.sampling import self_sampler
from linearize.training.data.train_dataset import TrainingText
from linearize.training.dataset_stage import DatasetStageConfig
from linearize.training.stages.attention_transfer import AttentionTransferConfig
from linearize.training.student_run import own

CALIBRATION_TOKENS = 16_384
EVALUATION_BATCH = 8
SENSITIVITY_TOKENS = 16_384
LOG = logging.getLogger("linearize")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """Everything that a conversion works on, checked.

    `plan`: the mixer of each layer in the end. `steps`: the layers converted after each step of the schedule; the
    student has those of the first. `scores`: how sensitive the layers are, where the plan asks for it. `heldout`: on
    the teacher's device. Of a draft `teacher` is its target and `layers` are the target's layers that it has.
    `layer_teacher`: the teacher with the student's layers: itself, or cut as the draft is; None where a draft has the
    mixers of a target that is a student. `teacher_weights`: what tells the teacher's weights from others.
    """

    name: str
    recipe: Recipe
    teacher: Any
    layer_teacher: Any
    layers: Sequence[int] | None
    tokenizer: Any
    student: LinearizedForCausalLM
    plan: Sequence[MixerConfig | None]
    steps: Sequence[Sequence[int]]
    scores: Sequence[LayerScore]
    text: TrainingText
    heldout: Sequence[Batch]
    teacher_weights: str


def prepare(
    name: str,
    recipe: Recipe,
    specs: Sequence[str],
    *,
    device: str | None = None,
    trust_remote_code: bool = False,
    asked: Container[str] = (),
    stage_on_cpu: bool = False,
) -> Prepared:
    """Load and check everything; nothing has been written or trained when this returns.

    Args:
        name: the teacher (of a draft: its target), a folder or a Hub name. specs: of the data.
        asked: recipe keys that were asked for: a length among them is refused beyond the teacher's context, where
            another is cut down to it.
        stage_on_cpu: the models stay in the CPU's memory, in their own dtype, unless the teacher has to write or score;
            whoever asks brings them to the device.

    Raises:
        InputError: anything given that cannot be used.
    """
    _check_starts(recipe.plan)
    makes_draft = recipe.plan.depth is not None
    runs = recipe.plan.needs_scores or any(spec == "self" or spec.startswith(PSEUDO) for spec in specs)
    teacher, tokenizer = _load_teacher(
        name, device, recipe.seed, trust_remote_code, students=makes_draft, on_cpu=stage_on_cpu and not runs,
        base=checked_base(recipe),
    )  # fmt: skip
    recipe, cut = fit_length(recipe, context(teacher), asked)
    layers = recipe.plan.draft_layers(teacher.config.get_text_config().num_hidden_layers)
    base = teacher if layers is None else truncate(teacher, layers)
    if isinstance(base, LinearizedForCausalLM):
        return _draft_of_student(name, recipe, teacher, tokenizer, base, layers or [], specs, cut)
    sites = probe(base)
    scores: list[LayerScore] = []
    plan, steps, untouched = planned(recipe.plan, sites, base, scores)
    student = _student(base, name, plan, recipe.seed)
    check_stages(recipe, student, base, tokenizer)
    check_saving(student, tokenizer)
    text, heldout = read_text(teacher, tokenizer, recipe.data, specs)
    if not stage_on_cpu:
        check_finite_outputs(teacher, name, heldout[0]["input_ids"][:1])
    check_rows(recipe, text, len(steps))
    if recipe.plan.needs_scores:
        assert recipe.plan.mixer is not None
        scores = layer_sensitivity(base, recipe.plan.mixer, _sample(recipe, text, teacher, SENSITIVITY_TOKENS))
        plan, steps, untouched = planned(recipe.plan, sites, base, scores)
    if scores or len(steps) > 1:
        first = [mixer if layer in steps[0] else None for layer, mixer in enumerate(plan)]
        student = _student(base, name, first, recipe.seed)
    for notice in cut + untouched:
        LOG.warning(notice)
    return Prepared(
        name=name, recipe=recipe, teacher=teacher, layer_teacher=base, layers=layers, tokenizer=tokenizer,
        student=student, plan=plan, steps=steps, scores=scores, text=text, heldout=heldout,
        teacher_weights=model_fingerprint(teacher),
    )  # fmt: skip


def _draft_of_student(
    name: str,
    recipe: Recipe,
    target: Any,
    tokenizer: Any,
    draft: LinearizedForCausalLM,
    layers: Sequence[int],
    specs: Sequence[str],
    notices: Sequence[str],
) -> Prepared:
    """A draft that keeps the mixers of the target's layers: nothing is converted, and no mixer starts anew."""
    if (mixer := recipe.plan.mixer) is not None:
        raise InputError(
            f"plan.mixer {mixer.name} given, but {name} is a student, whose draft keeps the mixers of its layers: "  # type: ignore[attr-defined]
            "set plan.mixer to null"
        )
    draft.config.teacher_name = name
    own(draft, target, draft.mixer_parameters())
    check_stages(recipe, draft, target, tokenizer, converted=False)
    check_saving(draft, tokenizer)
    text, heldout = read_text(target, tokenizer, recipe.data, specs)
    check_rows(recipe, text, 1)
    for notice in notices:
        LOG.warning(notice)
    return Prepared(
        name=name, recipe=recipe, teacher=target, layer_teacher=None, layers=layers, tokenizer=tokenizer,
        student=draft, plan=draft.config.mixers(), steps=[[]], scores=[], text=text, heldout=heldout,
        teacher_weights=model_fingerprint(target),
    )  # fmt: skip


def planned(
    plan: PlanConfig, sites: Sequence[AttentionSite], teacher: Any, scores: Sequence[LayerScore]
) -> tuple[list[MixerConfig | None], list[list[int]], list[str]]:
    """The mixer of each layer, the steps of the schedule, and what is to be told of layers that stay as they are.

    Where layers are chosen by scores that are not there yet, any choice of the right size stands for it.
    """
    wanted = plan.resolve(len(sites), [score.kl for score in scores] or [0.0] * len(sites))
    applied = check_plan(wanted, sites, teacher.config.model_type)
    kept = [i for i, mixer in enumerate(wanted) if mixer is not None and applied[i] is None]
    told = [f"layers {kept} keep their own attention: the teacher limits it to the mixer's window already"] * bool(kept)
    return applied, _steps(plan, wanted, applied), told


def _student(teacher: Any, name: str, plan: Sequence[MixerConfig | None], seed: int) -> LinearizedForCausalLM:
    torch.manual_seed(seed)
    return LinearizedForCausalLM.from_teacher(teacher, plan, teacher_name=name)


def inspect_sensitivity(
    teacher: str,
    *,
    data: Sequence[str],
    recipe: str | Recipe = DEFAULT_RECIPE,
    tokens: int = SENSITIVITY_TOKENS,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """What replacing each layer of a teacher alone by the recipe's mixer costs, on about `tokens` tokens. JSON-able.

    The text is the recipe's training part of the data, as where a conversion chooses its layers. `layers` has a
    `LayerScore` for each.

    Raises:
        InputError: a teacher, data or recipe that cannot be used.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if (mixer := chosen.plan.mixer) is None:
        raise InputError(f"recipe {chosen.name} has no plan.mixer to replace layers by: give another recipe")
    _check_starts(chosen.plan)
    model, tokenizer = _load_teacher(teacher, device, chosen.seed, trust_remote_code)
    chosen, cut = fit_length(chosen, context(model), ())
    text, _ = read_text(model, tokenizer, chosen.data, data)
    for notice in cut:
        LOG.warning(notice)
    sample = _sample(chosen, text, model, tokens)
    scores = layer_sensitivity(model, mixer, sample)
    return {
        "model": teacher,
        "mixer": str(mixer.name),  # type: ignore[attr-defined]
        "tokens": sum(batch["input_ids"].numel() for batch in sample),
        "layers": [asdict(score) for score in scores],
    }


def _steps(plan: PlanConfig, wanted: Sequence[Any], applied: Sequence[Any]) -> list[list[int]]:
    """The schedule's steps without the layers that stay as they are; at least one."""
    converted = [layer for layer, mixer in enumerate(wanted) if mixer is not None]
    left = [[i for i in step if applied[i] is not None] for step in plan.steps(converted, len(wanted))]
    return [step for i, step in enumerate(left) if step and (i == 0 or step != left[i - 1])] or [[]]


def _check_starts(plan: PlanConfig) -> None:
    """Refuse a calibrated start of mixers that have nothing to calibrate, before the teacher is loaded.

    Raises:
        InputError: such a mixer.
    """
    size = AttentionShape(num_heads=1, num_kv_heads=1, head_dim=2, value_dim=2, model_dim=2)
    for mixer in filter(None, (plan.mixer, *plan.overrides.values())):
        if isinstance(mixer, LayerMixerConfig) and mixer.initialise == "calibrate":
            with torch.random.fork_rng():
                built = mixer.build(size)
            if isinstance(built, LayerMixer) and type(built).calibrate is LayerMixer.calibrate:
                built.calibrate(())  # says why not, and what to do


def check_stages(
    recipe: Recipe, student: LinearizedForCausalLM, teacher: Any, tokenizer: Any, *, converted: bool = True
) -> None:
    """Refuse stages that could not run later on; `student` has every layer of the plan converted (not `converted`: it
    is a draft with its target's mixers).

    Raises:
        InputError: a stage that does not fit mixers, teacher, tokenizer or data.
    """
    mixers = student.mixers().values()
    others = sorted({str(mixer.config.name) for mixer in mixers if isinstance(mixer, LayerMixer)})  # type: ignore[attr-defined]
    for number, stage in enumerate(recipe.stages):
        if stage.tokens == 0:
            continue
        with _told_of(number):
            if isinstance(stage, DatasetStageConfig):
                stage.check_data(tokenizer, context(teacher))
                continue
            if stage.by_layer and not converted:
                raise InputError(
                    f"{stage.name} compares layers with the attention that they replaced, which a draft of a student "
                    "does not have: use distill"
                )
            if isinstance(stage, AttentionTransferConfig) and others:
                raise InputError(
                    f"attention_transfer compares attention outputs, which {', '.join(others)} does not have (it "
                    "replaces the whole attention module): use hidden_alignment"
                )
            stage.check(student, teacher)


def check_rows(recipe: Recipe, text: TrainingText, steps: int) -> None:
    """Refuse text that is too short for a stage's rows. Raises InputError."""
    for number, stage in enumerate(recipe.stages):
        if stage.tokens != 0 and not isinstance(stage, DatasetStageConfig):
            with _told_of(number):
                text.rows(stage.length or recipe.data.length, parts=steps if stage.at == "each" else 1)


@contextmanager
def _told_of(number: int) -> Iterator[None]:
    """Errors inside name the stage."""
    try:
        yield
    except InputError as error:
        raise InputError(f"stages.{number}: {error}") from error


def context(teacher: Any) -> int | None:
    """The teacher's longest context in tokens; None: no limit is known."""
    found: int | None = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    return found


def _load_teacher(
    name: str,
    device: str | None,
    seed: int,
    trust_remote_code: bool,
    *,
    students: bool = False,
    on_cpu: bool = False,
    base: BaseWeights = "full",
) -> tuple[Any, Any]:
    """Teacher (or one of our `students`, frozen) and tokenizer on their device, or on the way to it (`on_cpu`); in fp32
    where the device is a CPU. Raises InputError: also where it gives NaN."""
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    target = str(pick_device(device))
    where = "cpu" if on_cpu else target
    if students and is_student(name):
        teacher: Any = load(name, device=where)
        teacher.requires_grad_(False)
        tokenizer = load_tokenizer(name)
    else:
        dtype = torch.float32 if base != "full" and target == "cpu" else None
        teacher, tokenizer = load_teacher(
            name, dtype=dtype, device=where, trust_remote_code=trust_remote_code, base=base
        )  # fmt: skip
    if target == "cpu" and teacher.dtype in (torch.float16, torch.bfloat16):
        teacher = teacher.float()
    check_finite_weights(teacher, name)
    check_finite_outputs(teacher, name)
    return teacher, tokenizer


def read_text(
    teacher: Any,
    tokenizer: Any,
    data: DataConfig,
    specs: Sequence[str],
    device: torch.device | None = None,
    *,
    packs: Callable[[], bool] | None = None,
) -> tuple[TrainingText, list[Batch]]:
    """The text to train on, and the held-out batches on `device` (None: the teacher's).

    `packs`: whether the teacher keeps documents of one row apart (None: it is tried out); otherwise rows hold one each.
    """
    documents = load_documents(
        specs,
        tokenizer,
        sample=self_sampler(teacher, tokenizer, data, progress=_tell("written {done:,} of {all:,} tokens")),
        answer=pseudo_labeller(teacher, tokenizer, data, progress=_tell("answered {done:,} of {all:,} prompts")),
        answer_only=data.answer_only,
        say=lambda line: print(f"linearize: {line}", file=sys.stderr, flush=True),
    )
    parts = split(documents, data)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    alone = not (keeps_documents_apart(teacher) if packs is None else packs())
    if alone:
        LOG.warning(
            f"{teacher.config.model_type} does not keep the documents of a packed row apart: each row holds one "
            "document and padding, so that long documents or a smaller data.length train faster"
        )
    text = TrainingText(documents=parts.train, pad_token_id=pad, keep_whole=data.keep_whole, one_per_row=alone)
    rows = document_rows(parts.heldout, data.length, pad_token_id=pad, one_per_row=alone)
    return text, [
        {k: x.to(device or teacher.device) for k, x in batch.items()} for batch in rows.in_order(EVALUATION_BATCH)
    ]


def _tell(line: str) -> Callable[[int, int], None]:
    """A line on stderr for every tenth of what the teacher writes."""
    told = 0

    def tell(done: int, wanted: int) -> None:
        nonlocal told
        if (tenth := done * 10 // max(wanted, 1)) > told:
            told = tenth
            print(f"linearize: the teacher has {line.format(done=done, all=wanted)}", file=sys.stderr, flush=True)

    return tell


def _sample(recipe: Recipe, text: TrainingText, teacher: Any, tokens: int) -> list[Batch]:
    return text.sample(recipe.data.length, tokens, EVALUATION_BATCH, teacher.device)


def fit_length(recipe: Recipe, limit: int | None, asked: Container[str]) -> tuple[Recipe, list[str]]:
    """The recipe with rows that fit into the teacher's context, and what is to be told of it; refuses a length that was
    asked for and does not fit."""
    lengths = {"data.length": recipe.data.length}
    lengths |= {
        f"stages.{i}.length": stage.length
        for i, stage in enumerate(recipe.stages)
        if stage.length is not None and stage.tokens != 0
    }
    notices = []
    too_long = {key: length for key, length in lengths.items() if limit is not None and length > limit}
    for key, length in too_long.items():
        if key in asked or key.rpartition(".")[0] in asked:
            raise InputError(f"{key} {length} is beyond the teacher's context {limit}: set {key} to at most {limit}")
        notices.append(f"{key} is {limit}: the recipe's {length} is beyond the teacher's context")
    return recipe.override(dict.fromkeys(too_long, limit)), notices
