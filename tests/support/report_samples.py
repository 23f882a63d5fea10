"""Stand-in sections and reports for the tests of the page and the verdict: what sections promise, nothing measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from matplotlib.figure import Figure

from linearize.evaluation.context import EvalContext, Finding, Numbers, Plot, Section, SectionView, Stat, Table
from linearize.evaluation.report.schema import EvalReport, ModelEntry, Verdict
from linearize.evaluation.verdict import present_sections, verdict
from linearize.metrics.theme import colours, legend_below


class Losses(Section):
    """A table, a line for each model, a stat and, for a student whose loss is above 2, a fault."""

    NAME: ClassVar[str] = "language"
    TITLE: ClassVar[str] = "Language <modelling>"

    def run(self, ctx: EvalContext) -> Numbers:
        raise NotImplementedError

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        models = numbers["models"]

        def draw(figure: Figure) -> None:
            axis = figure.subplots()
            for name, colour in colours(models).items():
                axis.plot([1, 2, 4], [models[name]["loss"], 1, 0.5], marker="o", color=colour, label=name)
            legend_below(figure)

        findings = [
            Finding(level="bad" if model["loss"] > 2 else "good", text=f"{name}: loss {model['loss']}", student=name)
            for name, model in models.items()
            if name != "teacher"
        ]
        return SectionView(
            summary=f"{len(models)} models, {numbers.get('remark', '')}",
            findings=[*findings, Finding(level="note", text="few documents")],
            tables=[
                Table(
                    title="Loss & co",
                    rows=[{"model": name, "loss": model["loss"], "n": 12345} for name, model in models.items()],
                ),
                Table(title="By position", rows=[{"tokens": i, "loss": None, "x": f"{i} ± 1"} for i in range(23)]),
            ],
            plots=[Plot(name="loss", caption='Loss "over" tokens <fig>', draw=draw)],
        )

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        return {
            name: [Stat(label="loss gap", value=f"{model['loss']:.2f}", detail="nats > teacher")]
            for name, model in numbers["models"].items()
            if name != "teacher"
        }


class Memory(Section):
    """Two plots whose names another section has too, no headline."""

    NAME: ClassVar[str] = "recall"
    TITLE: ClassVar[str] = "Recall"

    def run(self, ctx: EvalContext) -> Numbers:
        raise NotImplementedError

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        def heat(figure: Figure) -> None:
            axis = figure.subplots()
            axis.imshow([[0.1, 0.9], [0.4, 1.0]], vmin=0, vmax=1)
            axis.text(0, 0, "10%", color="#ffffff")

        def line(figure: Figure) -> None:
            figure.subplots().plot([0, 1], [0, 1], marker="s")

        plots = [Plot(name="loss", caption="Heat.", draw=heat), Plot(name="line", caption="A line.", draw=line)]
        return SectionView(summary="Facts in text.", tables=[Table(title="Nothing", rows=[])], plots=plots)


SECTIONS: dict[str, type[Section]] = {"language": Losses, "recall": Memory}


def losses(names: Sequence[str], kept: float | None = None) -> Numbers:
    """Numbers of the stand-in `Losses`: 1.5, 1.6, ... in the order of the names."""
    models: dict[str, Any] = {name: {"loss": 1.5 + i / 10} for i, name in enumerate(names)}
    if kept is not None:
        for name in names[1:]:
            models[name]["kept"] = {"value": kept, "low": kept - 0.01, "high": kept + 0.01}
    return {"models": models}


def eval_models(names: Sequence[str]) -> list[ModelEntry]:
    """The first one is the teacher."""
    return [
        ModelEntry(
            name=name,
            role="student" if i else "teacher",
            path=f"models/{name}",
            student=i > 0,
            parameters=260_032 + i,
            dtype="float32",
            mixers=["lolcats", "lolcats", "softmax"] if i else [],
        )
        for i, name in enumerate(names)
    ]


def verdict_on(names: Sequence[str], sections: Mapping[str, Numbers]) -> Verdict:
    """The verdict on all names but the first, which is the teacher's."""
    return verdict(names[1:], present_sections(sections, SECTIONS))


def report_on(names: Sequence[str], sections: Mapping[str, Numbers]) -> EvalReport:
    """A report with notes and provenance that an HTML page must escape."""
    return EvalReport(
        format=1,
        suite="quick",
        contestants=eval_models(names),
        verdict=verdict_on(names, sections),
        sections=dict(sections),
        length=128,
        documents=7,
        notes=["few <documents>"],
        seconds={"language": 12.34, "recall": 0.5},
        provenance={
            "command": "linearize eval <x>",
            "seed": 3,
            "date": "2026-01-02T03:04:05",
            "libraries": {"a": "1", "b": None},
        },
    )
