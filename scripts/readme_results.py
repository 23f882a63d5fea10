"""The first table of docs/results.md (printed) and docs/img/stages.svg, from report.json files of one teacher.

python scripts/readme_results.py "window-linear=benchmarks/.../report.json" "lolcats=benchmarks/.../report.json"
"""

from __future__ import annotations

import sys
from pathlib import Path

from linearize.errors import InputError
from linearize.metrics.report import ConversionReport, read_report

OUT = Path(__file__).resolve().parents[1] / "docs" / "img"
COLOURS = ("#1f6fb4", "#e08214", "#5aa469", "#8c5aa8", "#444444")


def main(arguments: list[str]) -> None:
    """Read `label=path` arguments, print the table, write the plot."""
    if not arguments:
        raise SystemExit(__doc__)
    reports = dict(_read(argument) for argument in arguments)
    print(table(reports))
    for path in plot(reports, OUT):
        print(f"wrote {path}", file=sys.stderr)


def _read(argument: str) -> tuple[str, ConversionReport]:
    label, equals, path = argument.partition("=")
    report = read_report(Path(path).parent) if equals else None
    if report is None:
        raise InputError(f"{argument}: give LABEL=PATH/report.json")
    return label, report


def table(reports: dict[str, ConversionReport]) -> str:
    """Markdown: loss above the teacher's after the swap and each stage, the window alone, agreement."""
    stages = max((len(report.stages) for report in reports.values()), default=0)
    names = ["bare swap", *(f"after stage {i + 1}" for i in range(stages)), "window alone", "same top token"]
    lines = [f"| student | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for label, report in reports.items():
        losses: list[float | None] = [*above_teacher(report)]
        losses += [None] * (stages + 1 - len(losses))
        window = report.ablation["all_tokens"]["window"] - report.teacher_loss if report.ablation else None
        cells = ["" if x is None else f"{x:+.3f}" for x in (*losses, window)]
        lines.append(f"| {label} | {' | '.join([*cells, f'{report.student_top1:.1%}'])} |")
    return "\n".join(lines)


def above_teacher(report: ConversionReport) -> list[float]:
    """Losses above the teacher's: after the swap, then after each stage."""
    return [loss - report.teacher_loss for loss in (report.swap_loss, *(stage.loss_after for stage in report.stages))]


def plot(reports: dict[str, ConversionReport], folder: Path) -> list[Path]:
    """One line per student; the teacher is zero."""
    from linearize.metrics.plots import figure_files, new_figure

    stages = [stage.name for stage in max(reports.values(), key=lambda report: len(report.stages)).stages]
    with new_figure(folder / "stages", width=6.4) as (figure, (axis,)):
        for colour, (label, report) in zip(COLOURS, reports.items(), strict=False):
            values = above_teacher(report)
            steps = [0, *(1 + stages.index(stage.name) for stage in report.stages)]
            axis.plot(steps, values, marker="o", color=colour, label=f"{label} {values[-1]:+.3f}")
        names = ["bare swap", *(name.replace("_", " ") for name in stages)]
        axis.set_xticks(range(len(names)), names)
        axis.set_ylim(bottom=0)
        axis.margins(x=0.1)
        axis.set(title="Held-out loss above the teacher's", ylabel="nats per token")
        figure.legend(loc="outside lower center", ncols=1)
    return figure_files(folder, "stages")


if __name__ == "__main__":
    main(sys.argv[1:])
