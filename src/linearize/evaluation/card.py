"""The README.md of a student folder: what it is, what it was measured to do, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from linearize.evaluation.report import ConversionReport


def model_card(report: ConversionReport, recipe_yaml: str, config: Mapping[str, Any]) -> str:
    """Markdown with YAML front matter. `config` is the student's `config.json` as a dict."""
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(report), sort_keys=False, allow_unicode=True)}---",
        f"# {Path(report.teacher).name}, linearized",
        _summary(report, config),
        f"## Losses\n\n{_loss_table(report)}\n\n{_agreement(report)}",
        f"## How to load\n\n{_loading()}",
        f"## Recipe\n\n```yaml\n{recipe_yaml.strip()}\n```",
        f"## Limits\n\n{_limits(report)}",
        f"## Provenance\n\n{_provenance(report.provenance)}",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(report: ConversionReport) -> dict[str, Any]:
    return {
        "library_name": "linearize",
        "base_model": report.teacher,
        "base_model_relation": "finetune",
        "pipeline_tag": "text-generation",
        "tags": ["linearize", "linear-attention", "distillation", report.recipe],
    }


def _summary(report: ConversionReport, config: Mapping[str, Any]) -> str:
    tokens = sum(stage.tokens for stage in report.stages)
    kind = config.get("teacher", {}).get("model_type")
    family = f" (family `{kind}`)" if kind else ""
    return (
        f"A student of `{report.teacher}`{family}: same projections, other sequence mixers, made with "
        f"`linearize` and the recipe `{report.recipe}`, trained on {tokens:,} tokens of "
        f"{', '.join(f'`{spec}`' for spec in report.data)}."
    )


def _loss_table(report: ConversionReport) -> str:
    rows: list[tuple[Any, ...]] = [
        ("teacher", report.teacher_loss, None, None, None),
        ("after the swap, untrained", report.swap_loss, 0, None, None),
    ]
    rows += [(f"after `{s.name}`", s.loss_after, s.tokens, s.trainable_parameters, s.seconds) for s in report.stages]
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
        found = report.ablation["all_tokens"]
        text += f" Its window alone has loss {found['window']:.4f}, its linear branch alone {found['linear']:.4f}."
    return text


def _loading() -> str:
    return (
        '```python\nimport linearize\n\nmodel = linearize.load("path/to/this/folder")\n```\n\nor\n\n'
        "```python\nimport linearize  # registers the model with transformers\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n```'
    )


def _limits(report: ConversionReport) -> str:
    gap = report.student_loss - report.teacher_loss
    worse = "worse" if gap > 0 else "better"
    return "\n".join(
        (
            f"- The student is {abs(gap):.4f} nats per token {worse} than its teacher on the "
            "held-out text; on other text the gap may be larger, since the new parts saw only the data named above.",
            "- Exact recall of details far back in the text is where linear attention is weakest; "
            "the loss above hardly shows it.",
            "- What is wrong or biased in the teacher is so in the student.",
            "- No licence is stated here: the student is made from its teacher's weights, "
            "so see the teacher's licence first.",
        )
    )


def _provenance(found: Mapping[str, Any]) -> str:
    commit = (
        f", commit `{found['commit']}`{' (modified)' if found.get('modified') else ''}" if found.get("commit") else ""
    )
    libraries = ", ".join(f"{name} {number}" for name, number in found.get("libraries", {}).items() if number)
    hardware = found.get("hardware", {})
    where = ", ".join(filter(None, (hardware.get("cpu"), f"{hardware.get('cores')} cores", *hardware.get("gpus", []))))
    return (
        f"`{found.get('command')}`\n\nlinearize {found.get('package_version')}{commit}; {libraries}; {where}; "
        f"seed {found.get('seed')}; {found.get('date')}."
    )
