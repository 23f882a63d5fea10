"""What a GPU report has: its parts in order of worth, and the summary of their results as Markdown.

Imports the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MACHINE = ("gpu", "driver", "torch", "cuda", "triton", "flash-attn", "flash-linear-attention", "mamba-ssm")
LONGEST = 70  # characters of a cell


@dataclass(frozen=True, kw_only=True)
class Part:
    """A process of the report, and how its rows are shown.

    `command`: module and options; `{seconds}`, `{parts}` and `{out}` are replaced. `large`: further options on a GPU,
    `small`: those with `--interpret`. `limit`: the most seconds; `share`: the most of the time left; `least`: with
    fewer seconds left it is not begun. `columns`: of its table in the summary, heading and place in a row.
    """

    name: str
    what: str
    command: tuple[str, ...]
    large: tuple[str, ...] = ()
    small: tuple[str, ...] = ("--interpret",)
    limit: float
    share: float = 1.0
    least: float = 20
    columns: Mapping[str, str] = field(default_factory=dict)


def _student(name: str, share: float) -> Part:
    losses = {"gap at 2048": "loss.student.gap.value", "error": "loss.student.gap.error", "KL": "loss.student.kl.value"}
    return Part(
        name=name,
        what=f"SmolLM2 converted with {name}: gap to the teacher on text not trained on (nats per token)",
        command=("benchmarks.gpu_parts", "student", name, "--seconds", "{seconds}", "--parts", "{parts}", "--folder",
                 "{out}"),
        limit=270, share=share, least=60,
        columns={"tokens a stage": "tokens", "tokens/s": "tokens_per_second", **losses,
                 "top-1": "loss.student.top1.value", "window alone": "loss.window.gap.value", "kept in": "kept"},
    )  # fmt: skip


_TOKENS = {"tokens": "tokens"}
_SPEED = {"teacher, tokens/s": "tokens_per_second.teacher", "student, tokens/s": "tokens_per_second.student"}
PARTS: tuple[Part, ...] = (
    Part(
        name="tests", what="tests of the kernels on the GPU", command=("benchmarks.gpu_parts", "tests"),
        limit=110, columns={"file": "file", "passed": "passed", "failed": "failed", "skipped": "skipped"},
    ),
    Part(
        name="window", what="window + linear attention against FlashAttention-2",
        command=("benchmarks.window_gpu",), large=("--repeats", "10"), limit=60,
        small=("--interpret", "--tokens", "18", "--head-dim", "4", "--window", "4"),
        columns=_TOKENS | {"head dim": "head_dim", "forward, times as fast": "forward.speedup",
                           "asked": "asked_forward", "ours, ms": "forward.milliseconds.ours.0",
                           "with backward": "forward_backward.speedup",
                           "share of the matmul peak": "forward.share_of_matmul_peak",
                           "share of the bandwidth": "forward.share_of_bandwidth"},
    ),
    Part(
        name="model", what="an 8B shape: prefill, decoding, training step", limit=70,
        command=("benchmarks.model_gpu", "--generated", "0"),
        large=("--context", "1024", "8192", "32768", "--repeats", "3"),
        columns={"what": "what", "context": "context", **_SPEED, "times as fast": "speedup"},
    ),
    Part(
        name="batch", what="an 8B shape: largest batch, and tokens/s at 4,096 generated tokens", limit=70,
        command=("benchmarks.model_gpu", "--context"),
        columns={"what": "what", "model": "model", "rows": "batch", "tokens/s": "tokens_per_second",
                 "rows, student over teacher": "batch_ratio", "tokens/s, over teacher": "tokens_per_second_ratio",
                 "reason": "reason"},
    ),
    Part(
        name="recurrent", what="recurrent operations against fla and mamba-ssm, where installed", limit=55,
        command=("benchmarks.recurrent_gpu",), large=("--tokens", "1", "4", "2048", "16384", "--repeats", "10"),
        small=("--interpret", "--tokens", "3", "--operation", "decay per key", "gated delta"),
        columns={"operation": "operation", **_TOKENS, "backward": "backward", "theirs over ours": "theirs_over_ours",
                 "take": "take"},
    ),
    _student("window-linear", 0.6),
    _student("lolcats", 0.75),
    Part(
        name="multi-step", what="one launch for several tokens against one token at a time", limit=40,
        command=("benchmarks.multi_step_gpu",), large=("--graphs",),
        small=("--interpret", "--mixers", "mamba2", "sliding_window", "--tokens", "1", "--heads", "1", "--tail", "1"),
        columns={"mixer": "mixer", "tokens": "new_tokens", "over PyTorch": "speedup_over_unfused",
                 "over single tokens": "speedup_over_single", "reason": "reason"},
    ),
    Part(
        name="exactness", what="error of every backend over that of SDPA in the same dtype", limit=60,
        command=("benchmarks.exactness", "--quick"), large=("--device", "cuda"), small=("--dtype", "fp32"),
        columns={"operation": "operation", "backend": "backend", "dtype": "dtype", "case": "case", "worst": "worst"},
    ),
)  # fmt: skip


def summary(machine: Mapping[str, Any], parts: Sequence[tuple[Mapping[str, Any], Mapping[str, str]]]) -> str:
    """What was measured on which machine: the state of all parts, then a table of each that has rows.

    `parts`: what is recorded of each, and the columns of its table (heading: place in a row, with dots).
    """
    versions = ", ".join(f"{name} {cell(machine[name])}" for name in MACHINE if machine.get(name))
    lines = ["# GPU report", "", versions or "not measured: no machine is recorded", ""]
    lines += table(
        [{"part": part["part"], "state": state(part), "seconds": part.get("seconds")} for part, _ in parts],
        {"part": "part", "state": "state", "seconds": "seconds"},
    )
    for part, columns in parts:
        result = part.get("result") or {}
        if part["status"] == "not run" or not (result.get("rows") or part.get("output")):
            continue
        lines += ["", f"## {part['part']}: {part['what']}", ""]
        if part["status"] != "done":
            lines += [f"{part['status']}: {last_line(part)}", ""]
        lines += table(result.get("rows") or [], columns)
        lines += [f"- failed: {name}" for name in result.get("failed") or []]
    return "\n".join(lines) + "\n"


def state(part: Mapping[str, Any]) -> str:
    """The status, and the reason where there is one."""
    reason = part.get("reason")
    return f"{part['status']}: {reason}" if reason else str(part["status"])


def last_line(part: Mapping[str, Any]) -> str:
    """The last line that a part printed."""
    lines = str(part.get("output") or "").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it printed nothing"


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """Lines of a table; columns in which no row has anything are left out."""
    cells = {heading: [cell(_at(row, place)) for row in rows] for heading, place in columns.items()}
    cells = {heading: column for heading, column in cells.items() if any(column)}
    if not cells:
        return []
    lines = [" | ".join(cells), " | ".join(["---"] * len(cells))]
    lines += [" | ".join(row) for row in zip(*cells.values(), strict=True)]
    return [f"| {line} |" for line in lines]


def cell(value: Any) -> str:
    """A value as a cell: numbers short, nothing where there is none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return str(value).replace("|", "/").replace("\n", " ")[:LONGEST]


def _at(row: Any, place: str) -> Any:
    """What is in a row at `a.b.0`; a text on the way (the reason of a failure) is the answer."""
    for key in place.split("."):
        if isinstance(row, str):
            return row
        if isinstance(row, list):
            row = row[int(key)] if int(key) < len(row) else None
        else:
            row = row.get(key) if isinstance(row, Mapping) else None
    return row
