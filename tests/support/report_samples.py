"""Stand-in sections and reports for the tests of the page and the verdict: what sections promise, nothing measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from matplotlib.figure import Figure

from linearize.evaluation.context import EvalContext, Finding, Numbers, Plot, Section, SectionView, Stat, Table
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
            Finding(level="bad" if found["loss"] > 2 else "good", text=f"{name}: loss {found['loss']}", student=name)
            for name, found in models.items()
            if name != "teacher"
        ]
        return SectionView(
            summary=f"{len(models)} models, {numbers.get('remark', '')}",
            findings=[*findings, Finding(level="note", text="few documents")],
            tables=[
                Table(
                    title="Loss & co",
                    rows=[{"model": name, "loss": found["loss"], "n": 12345} for name, found in models.items()],
                ),
                Table(title="By position", rows=[{"tokens": i, "loss": None, "x": f"{i} ± 1"} for i in range(23)]),
            ],
            plots=[Plot(name="loss", caption='Loss "over" tokens <fig>', draw=draw)],
        )

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        return {
            name: [Stat(label="Loss gap", value=f"{found['loss']:.2f}", detail="nats > teacher")]
            for name, found in numbers["models"].items()
            if name != "teacher"
        }


class Memory(Section):
    """Two plots whose names stand in another section too, no headline."""

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


def eval_models(names: Sequence[str]) -> list[dict[str, Any]]:
    """The first one is the teacher."""
    return [
        {
            "name": name,
            "role": "student" if i else "teacher",
            "path": f"models/{name}",
            "parameters": 260_032 + i,
            "mixers": ["lolcats", "lolcats", "softmax"] if i else [],
        }
        for i, name in enumerate(names)
    ]
