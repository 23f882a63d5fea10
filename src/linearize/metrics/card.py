"""The README.md of a student folder: what it is, what it was measured to do, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from linearize.metrics.report import ConversionReport
from linearize.modeling.io.model_source import looks_local


def model_card(
    report: ConversionReport, recipe_yaml: str, config: Mapping[str, Any], *, adapter_only: bool = False
) -> str:
    """Markdown with YAML front matter. `config` is the student's `config.json` as a dict; `adapter_only`: the folder
    holds mixers and LoRA alone."""
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(report), sort_keys=False, allow_unicode=True)}---",
        f"# {_title(report)}",
        *_draft(report.provenance.get("draft")),
        _summary(report, config),
        f"## Losses\n\n{_loss_table(report)}\n\n{_agreement(report)}",
        f"## How to load\n\n{_loading(report.teacher if adapter_only else None)}",
        f"## Recipe\n\n```yaml\n{recipe_yaml.strip()}\n```",
        f"## Limits\n\n{_limits(report, _mixers(config))}",
        f"## Provenance\n\n{_provenance(report.provenance)}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(report: ConversionReport) -> dict[str, Any]:
    """For the Hub, which knows a base model by its name there, not by a path of this machine."""
    known = {} if looks_local(report.teacher) else {"base_model": report.teacher, "base_model_relation": "finetune"}
    return {
        "library_name": "linearize",
        **known,
        "pipeline_tag": "text-generation",
        "tags": ["linearize", "linear-attention", "distillation", report.recipe],
    }


def _title(report: ConversionReport) -> str:
    name = Path(report.teacher).name
    return f"A draft of {name}" if "draft" in report.provenance else f"{name}, linearized"


def _draft(draft: Mapping[str, Any] | None) -> list[str]:
    """What a draft is, where this is one: some layers of its target."""
    if draft is None:
        return []
    layers = draft["layers"]
    which = f"Layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
    return [
        f"{which} of the target's {draft['of']}, with its vocabulary: it proposes tokens that the target verifies "
        "(`linearize generate TARGET --draft FOLDER`). Below, *teacher* is the target; the share of tokens where both "
        "have the same most likely one estimates how often greedy decoding accepts a proposed token."
    ]


def _summary(report: ConversionReport, config: Mapping[str, Any]) -> str:
    kind = config.get("teacher", {}).get("model_type")
    family = f" (family `{kind}`)" if kind else ""
    return (
        f"A student of `{report.teacher}`{family}: {_what_mixes(_mixers(config))}. Made with `linearize` and the "
        f"recipe `{report.recipe}`, trained on {_trained_on(report)}."
    )


def _mixers(config: Mapping[str, Any]) -> list[str | None]:
    """By layer the mixer's name, None where softmax attention stays."""
    return [None if entry is None else str(entry["name"]) for entry in config.get("plan") or ()]


def _what_mixes(mixers: Sequence[str | None]) -> str:
    """Which layers have which mixer, in words."""
    kinds = dict.fromkeys(name for name in mixers if name is not None)
    if not kinds:
        return "no layer has another sequence mixer"
    if len(kinds) == 1 and None not in mixers:
        return f"`{next(iter(kinds))}` in the place of softmax attention in all {len(mixers)} layers"
    named = [f"`{kind}` in {_layers(mixers, kind)}" for kind in kinds]
    one = mixers.count(None) == 1
    kept = f"; {_layers(mixers, None)} keep{'s' * one} it" if None in mixers else ""
    return f"{' and '.join(named)} of {len(mixers)} in the place of softmax attention{kept}"


def _layers(mixers: Sequence[str | None], kind: str | None) -> str:
    """The layers with this mixer: `layer 3`, `layers 0, 2`."""
    numbers = [str(layer) for layer, name in enumerate(mixers) if name == kind]
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"


def _trained_on(report: ConversionReport) -> str:
    """Tokens and their source, those of stages with data of their own apart."""
    tokens: dict[str, int] = {}
    for stage in report.stages:
        own = stage.details.get("data")
        source = f"`{own}`" if own else ", ".join(f"`{spec}`" for spec in report.data)
        tokens[source] = tokens.get(source, 0) + stage.tokens
    return " and ".join(f"{count:,} tokens of {source}" for source, count in tokens.items()) or "nothing"


def _loss_table(report: ConversionReport) -> str:
    rows: list[tuple[Any, ...]] = [("teacher", report.teacher_loss, None, None, None)]
    swaps = sum(moment.stage is None for moment in report.moments())
    swap = 0
    for name, loss, stage in report.moments():
        if stage is None:
            swap += 1
            which = "the swap" if swaps == 1 else f"swap {swap} of {swaps}"
            rows.append((f"after {which}, untrained", loss, 0, None, None))
        else:
            rows.append((f"after `{name}`", loss, stage.tokens, stage.trainable_parameters, stage.seconds))
    lines = ["| | loss | above the teacher | tokens | parameters trained | seconds |", "|---|---:|---:|---:|---:|---:|"]
    for name, loss, *counts in rows:
        above = "" if name == "teacher" else f"{loss - report.teacher_loss:+.4f}"
        cells = [f"{loss:.4f}", above, *("" if c is None else f"{c:,.0f}" for c in counts)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _agreement(report: ConversionReport) -> str:
    text = (
        f"Nats per token on {report.heldout_tokens:,} held-out tokens that training never saw. The student has "
        f"loss {report.student_loss:.4f}, KL(teacher||student) {report.student_kl:.4f}, and the teacher's most "
        f"likely token in {report.student_top1:.1%} of cases."
    )
    if report.ablation:
        losses = report.ablation["all_tokens"]
        text += f" Its window alone has loss {losses['window']:.4f}, its linear branch alone {losses['linear']:.4f}."
    return text


def _loading(teacher: str | None) -> str:
    """Code that loads the student, and what makes a folder for other programs. `teacher`: of an adapter."""
    if teacher is not None:
        return (
            "The folder holds mixers and LoRA alone, for the weights of this teacher:\n\n"
            f'```python\nimport linearize\n\nmodel = linearize.load("{teacher}", adapter="path/to/this/folder")\n```'
        )
    return (
        '```python\nimport linearize\n\nmodel = linearize.load("path/to/this/folder")\n```\n\nor\n\n'
        "```python\nimport linearize  # registers the model with transformers\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```\n\n'
        "For programs without linearize: `linearize export path/to/this/folder --to hf --out FOLDER`, or `--to "
        "granite-hybrid` or `--to qwen3.5` where the layers fit."
    )


def _limits(report: ConversionReport, mixers: Sequence[str | None]) -> str:
    gap = report.student_loss - report.teacher_loss
    worse = "worse" if gap > 0 else "better"
    return "\n".join(
        (
            f"- The student is {abs(gap):.4f} nats per token {worse} than its teacher on the "
            "held-out text; on other text the gap may be larger, since the new parts saw only the data named above.",
            f"- {_memory(mixers)}",
            "- What is wrong or biased in the teacher is so in the student.",
            "- No licence is stated here: the student is made from its teacher's weights, "
            "so see the teacher's licence first.",
        )
    )


def _memory(mixers: Sequence[str | None]) -> str:
    """What the student remembers of a long text, and what that costs."""
    kept = [layer for layer, name in enumerate(mixers) if name is None]
    weak = "Exact recall of details far back in the text is where a state of fixed size is weakest"
    if not kept:
        return f"{weak}; the loss above hardly shows it. No layer's memory grows with the text."
    one = len(kept) == 1
    return (
        f"{weak}; the loss above hardly shows it. {_layers(mixers, None).capitalize()} keep{'s' * one} softmax "
        f"attention, so {'its' if one else 'their'} cache grows with the text as the teacher's does."
    )


def _provenance(facts: Mapping[str, Any]) -> str:
    commit = (
        f", commit `{facts['commit']}`{' (modified)' if facts.get('modified') else ''}" if facts.get("commit") else ""
    )
    libraries = ", ".join(f"{name} {number}" for name, number in facts.get("libraries", {}).items() if number)
    hardware = facts.get("hardware", {})
    where = ", ".join(filter(None, (hardware.get("cpu"), f"{hardware.get('cores')} cores", *hardware.get("gpus", []))))
    return (
        f"`{facts.get('command')}`\n\nlinearize {facts.get('package_version')}{commit}; {libraries}; {where}; "
        f"seed {facts.get('seed')}; {facts.get('date')}."
    )
