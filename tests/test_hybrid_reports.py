"""What report, model card and plots say of hybrids and of conversions in many steps, as their reader meets it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure
from models import mixer
from test_evaluation_outputs import some_report, tiny_llama, tiny_tokenizer

from linearize.evaluation import EvaluationOptions, evaluate
from linearize.metrics import plots
from linearize.metrics.card import model_card
from linearize.metrics.plots import plot_layer_error, plot_stages
from linearize.metrics.report import ConversionReport, StageReport, read_report, write_report
from linearize.modeling import LinearizedForCausalLM

CPU = EvaluationOptions(device="cpu")
COUNTS = {"trainable_parameters": 10, "seconds": 1.0}


def stage(name: str, before: float, after: float, tokens: int = 100, **details: Any) -> StageReport:
    return StageReport(name=name, loss_before=before, loss_after=after, tokens=tokens, details=details, **COUNTS)


def scheduled(steps: int) -> ConversionReport:
    """A step converts a layer (the loss jumps), two stages repair it."""
    stages = []
    for step in range(steps):
        loss = 2.0 + step / 64
        stages += [stage(f"distill ({step + 1}/{steps})", loss, loss - 0.2) for loss in (loss, loss - 0.2)]
    return some_report(stages=stages, swap_loss=2.0)


def card(report: ConversionReport, *names: str | None) -> str:
    config = {"teacher": {"model_type": "llama"}, "plan": [None if name is None else {"name": name} for name in names]}
    return model_card(report, "name: some\n", config)


# the report


def test_stages_of_one_name_are_numbered() -> None:
    report = some_report(stages=[stage("distill", 2.5, 2.0), stage("dpo", 2.0, 1.9), stage("distill", 1.9, 1.5)])
    assert report.stage_names() == ["distill #1", "dpo", "distill #2"]
    assert [name for name, _, _ in report.moments()] == ["swap", "distill #1", "dpo", "distill #2"]


def test_each_swap_of_a_schedule_is_a_moment() -> None:
    moments = scheduled(3).moments()
    assert [moment.stage is None for moment in moments] == [True, False, False] * 3
    assert [moment.loss for moment in moments][:4] == pytest.approx([2.0, 1.8, 1.6, 2.0 + 1 / 64])


def test_the_mixers_by_layer_come_back(tmp_path: Path) -> None:
    report = some_report().model_copy(update={"mixers": ["mamba2", None]})
    write_report(report, tmp_path)
    assert read_report(tmp_path) == report


# the model card


def test_the_card_says_which_layers_hold_what() -> None:
    hybrid = card(some_report(), "mamba2", None, "mamba2", "lolcats", None)
    assert "`mamba2` in layers 0, 2 and `lolcats` in layer 3 of 5 in the place of softmax attention" in hybrid
    assert "layers 1, 4 keep it" in hybrid
    assert "Layers 1, 4 keep softmax attention, so their cache grows" in hybrid
    assert "same projections" not in hybrid
    whole = card(some_report(), "gla", "gla")
    assert "`gla` in the place of softmax attention in all 2 layers" in whole
    assert "No layer's memory grows with the text" in whole


def test_the_card_counts_tokens_where_they_were_read() -> None:
    stages = [
        stage("distill", 2.5, 2.0, 700),
        stage("distill", 2.0, 1.5, 300),
        stage("dpo", 1.5, 1.6, 50, data="p.json"),
    ]
    card_text = card(some_report(stages=stages), "mamba2")
    assert "trained on 1,000 tokens of `a.txt`, `b.jsonl` and 50 tokens of `p.json`." in card_text
    assert "| after `distill #2` | 1.5000 |" in card_text


def test_the_card_shows_every_swap_of_a_schedule() -> None:
    card_text = card(scheduled(3), "mamba2", "mamba2", "mamba2")
    rows = [line for line in card_text.splitlines() if "untrained" in line]
    assert [row.split(" | ")[0] for row in rows] == [f"| after swap {i} of 3, untrained" for i in (1, 2, 3)]
    assert rows[2].split(" | ")[1] == "2.0312"


# the plots


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, in order."""
    figures: list[Figure] = []

    def keep(figure: Figure, path: Any, **_: Any) -> None:
        if figure not in figures:
            figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def texts_apart(figure: Figure) -> bool:
    """Whether no two names on the x axis, and no two numbers in the plot, cover each other."""
    figure.canvas.draw()
    axis, renderer = figure.axes[0], figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for group in (axis.get_xticklabels(), axis.texts):
        boxes = [text.get_window_extent(renderer) for text in group if text.get_text()]
        if any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]):
            return False
    return True


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 32])
def test_the_stages_of_any_schedule_can_be_read(drawn: list[Figure], tmp_path: Path, steps: int) -> None:
    report = scheduled(steps)
    plot_stages(report, tmp_path)
    (figure,) = drawn
    assert texts_apart(figure)
    assert figure.get_size_inches()[0] < 13
    axis = figure.axes[0]
    line = next(line for line in axis.lines if line.get_label() == plots.LABELS["student"])
    assert list(line.get_ydata()) == [moment.loss for moment in report.moments()]
    assert [text.get_text() for text in axis.texts][-1] == f"{report.stages[-1].loss_after:.3f}"


def test_the_bars_of_a_hybrid_stand_at_their_layers(drawn: list[Figure], tmp_path: Path) -> None:
    plot_layer_error({"swap": [0.5, 0.25], "0-distill": [0.25, 0.125]}, tmp_path, layers=[1, 4])
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == ["1", "4"]


# evaluation


def test_a_student_of_pseudo_labels_is_evaluated_on_its_held_out_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    teacher = tiny_llama(1)
    student = LinearizedForCausalLM.from_teacher(teacher, [mixer("mamba2"), None, None])
    for path, model in ((tmp_path / "teacher", teacher), (tmp_path / "student", student)):
        model.save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
    (tmp_path / "asked.jsonl").write_text("\n".join(json.dumps({"prompt": f"Tell of {i}: "}) for i in range(9)))
    report = some_report(teacher=str(tmp_path / "teacher"), data=[f"pseudo:{tmp_path / 'asked.jsonl'}"])
    write_report(report, tmp_path / "student")
    settings = {"length": 40, "heldout": 2, "pseudo_max_new_tokens": 12}
    (tmp_path / "student" / "recipe.yaml").write_text(yaml.safe_dump({"data": settings}))
    result = evaluate(tmp_path / "student", options=CPU)
    assert result.documents == 2 and "held-out part" in result.notes[0]


@pytest.mark.parametrize(
    ("names", "branches"),
    [(["lolcats", "mamba2", None], True), (["gla", None, "gla"], True), ([None, "mamba2", None], False)],
)
def test_students_of_any_plan_can_be_evaluated(tmp_path: Path, names: list[str | None], branches: bool) -> None:
    teacher = tiny_llama(1)
    student = LinearizedForCausalLM.from_teacher(teacher, [None if name is None else mixer(name) for name in names])
    for path, model in ((tmp_path / "teacher", teacher), (tmp_path / "student", student)):
        model.save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
    (tmp_path / "text.txt").write_text("\n\n".join(f"Story {i}: the cat sat. {'On. ' * i}" for i in range(9)))
    data = [str(tmp_path / "text.txt")]
    result = evaluate(tmp_path / "student", teacher=tmp_path / "teacher", data=data, options=CPU)
    assert (result.sections["branches"]["models"]["student"]["ablation"] is not None) == branches
    assert result.student_loss is not None and result.student_loss > 0
