"""The section Layers: entropy, effective length and distance against plain computations; errors against the stages'."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import mixer, student_of, text, tiny

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel
from linearize.evaluation.sections.layers import Layers
from linearize.evaluation.sections.layers.measure import (
    implied_weights,
    shape_of,
    student_shapes,
    teacher_shapes,
)
from linearize.training.data.documents import Document
from linearize.training.stages.hidden_alignment import (
    HiddenAlignment,
    HiddenAlignmentConfig,
    batch_layout,
    module_calls,
)

TOKENIZER: Any = SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=0)
T, FAR, FIRST = 31, 9, 13
PLAN = [mixer(), mixer("mamba2"), mixer("gla", window=3)]


@pytest.fixture(scope="module")
def teacher() -> Any:
    return tiny("llama", head_dim=6)


def batch(tokens: int = T, seed: int = 4) -> dict[str, torch.Tensor]:
    ids = text(1, tokens, seed=seed)
    return {"input_ids": ids, "position_ids": torch.arange(tokens)[None], "labels": ids}


def eval_context(*models: Any) -> EvalContext:
    eval_models = tuple(
        EvalModel(
            name="teacher" if not i else f"student{i}", role="student" if i else "teacher", path="", model=model,
            tokenizer=TOKENIZER, fingerprint=str(i),
        )
        for i, model in enumerate(models)
    )  # fmt: skip
    rows = [text(1, n, seed=n)[0].tolist() for n in (5, 37, 23, 29)]
    return EvalContext(models=eval_models, documents=[Document(row, [1] * len(row)) for row in rows], length=64)


def measured(section: Layers, context: EvalContext) -> Any:
    return json.loads(json.dumps(section.run(context), allow_nan=False))


def test_shapes_of_known_rows() -> None:
    even = torch.ones(2, T, T).tril()
    for weights in (even / even.sum(-1, keepdim=True), -3 * even, even * torch.tensor([1.0, -1.0])[:, None, None]):
        shape, rows = shape_of(weights, far=FAR, first=FIRST), range(FIRST, T)
        assert shape.entropy == pytest.approx(sum(math.log(n + 1) for n in rows) / len(rows))
        assert shape.effective == pytest.approx(sum(n + 1 for n in rows) / len(rows))
        assert shape.distance == pytest.approx(sum(n / 2 for n in rows) / len(rows))
        assert shape.far == pytest.approx(sum((n + 1 - FAR) / (n + 1) for n in rows) / len(rows))
    itself = shape_of(torch.eye(T)[None], far=FAR, first=FIRST)
    assert (itself.entropy, itself.effective, itself.distance, itself.far) == (0, 1, 0, 0)


def test_the_teachers_rows_are_transformers_own(teacher: Any) -> None:
    with torch.no_grad():
        attentions = teacher(**{k: v for k, v in batch().items() if k != "labels"}, output_attentions=True).attentions
    shapes = teacher_shapes(teacher, batch(), far=FAR, first=FIRST)
    assert list(shapes) == [0, 1, 2]
    for layer, weights in enumerate(attentions):
        p = weights[0, :, FIRST:].double()
        entropy = torch.distributions.Categorical(p).entropy()
        back = torch.tensor([[n - i for i in range(T)] for n in range(FIRST, T)])
        shape = shapes[layer]
        assert shape.entropy == pytest.approx(float(entropy.mean()), abs=1e-4)
        assert shape.effective == pytest.approx(float(entropy.exp().mean()), abs=1e-3)
        assert shape.distance == pytest.approx(float((p * back).sum(-1).mean()), abs=1e-3)
        assert shape.far == pytest.approx(float(p[:, back >= FAR].sum() / p.sum()), abs=1e-4)


@pytest.mark.parametrize(
    "config", [mixer(), mixer("gla", window=3), mixer("sliding_window"), mixer(window=0, num_sinks=0)], ids=str
)
def test_implied_weights_give_the_mixers_output(teacher: Any, config: Any) -> None:
    student, inputs = student_of(teacher, config), batch()
    layout, name = batch_layout(inputs), student.config.attention[1]
    call, module = module_calls(teacher, inputs, [name])[name], student.lm.get_submodule(name)
    with torch.no_grad():
        weights_HTT = implied_weights(module, call, layout)[0]
        values = module.v_proj(call.hidden)[0].unflatten(-1, (-1, module.head_dim)).transpose(0, 1)
        y = weights_HTT @ values.repeat_interleave(weights_HTT.shape[0] // values.shape[0], dim=0)
        expected = module.o_proj(y.transpose(0, 1).flatten(1))
        torch.testing.assert_close(call.repeat(module, layout)[0], expected, rtol=1e-4, atol=1e-5)
    assert (weights_HTT.triu(1) == 0).all() and weights_HTT.abs().sum() > 1


def test_errors_are_those_of_hidden_alignment(teacher: Any) -> None:
    student = student_of(teacher, [mixer(), mixer("mamba2"), mixer("retention")])
    shapes = student_shapes(student, teacher, batch(), far=FAR, first=FIRST)
    run = HiddenAlignment(HiddenAlignmentConfig(tokens=0, lr=1.0), student, teacher)
    whole = {**batch(), "labels": torch.ones(1, T + 1, dtype=torch.long)[:, :T]}
    calls = module_calls(teacher, whole, student.config.attention)
    for layer, (output, call) in run._outputs(whole).items():
        expected = (output - call.output).detach().square().sum() / call.output.square().sum()
        shape = shapes[layer]
        assert shape.error is not None and shape.power is not None
        assert shape.error / shape.power == pytest.approx(float(expected), rel=1e-4)
    assert len(calls) == len(shapes) == 3


def test_the_section_measures_all_layers_of_all_models(teacher: Any) -> None:
    from matplotlib.figure import Figure

    students = [student_of(teacher, plan) for plan in (PLAN, [None, mixer("sliding_window"), None])]
    context, section = eval_context(teacher, *students), Layers(texts=3, tokens=33)
    numbers = measured(section, context)
    assert measured(section, context) == numbers and numbers["tokens"] == [33, 29, 23] and numbers["far"] == 8
    models = numbers["models"]
    assert [layer["layer"] for layer in models["student1"]["layers"]] == [0, 1, 2]
    assert [(layer["layer"], layer["mixer"]) for layer in models["student2"]["layers"]] == [(1, "sliding_window")]
    first = context.documents[1].tokens[:33]
    one = {"input_ids": torch.tensor([first]), "position_ids": torch.arange(33)[None]}
    shapes = [student_shapes(students[0], teacher, one, far=8, first=16)]
    for n, row in ((29, context.documents[3].tokens), (23, context.documents[2].tokens)):
        one = {"input_ids": torch.tensor([row]), "position_ids": torch.arange(n)[None]}
        shapes.append(student_shapes(students[0], teacher, one, far=8, first=n // 2))
    for layer in models["student1"]["layers"]:
        entropies = torch.tensor([s[layer["layer"]].entropy for s in shapes], dtype=torch.float64)
        assert layer["entropy"]["value"] == pytest.approx(float(entropies.mean()))
        assert layer["entropy"]["error"] == pytest.approx(float(entropies.std() / 3**0.5))
        errors = [s[layer["layer"]] for s in shapes]
        assert layer["error"]["value"] == pytest.approx(sum(e.error for e in errors) / sum(e.power for e in errors))
    shown = Layers.present(numbers)
    assert [len(table.rows) for table in shown.tables] == [3, 3, 1]
    assert [(finding.level, finding.student) for finding in shown.findings] == [
        ("note", "student1"),
        ("note", "student2"),
    ]
    for plot in shown.plots:
        figure = Figure(figsize=(plot.width, plot.height), layout="constrained")
        plot.draw(figure)
        assert figure.axes[0].has_data()
    assert len(shown.plots) == 3


def test_without_a_teacher_of_its_kind_a_student_is_given_its_own_states(teacher: Any) -> None:
    student, other = student_of(teacher, PLAN), tiny("qwen3")
    section = Layers(texts=2, tokens=24)
    for context, name in ((eval_context(other, student), "student1"), (eval_context(student), "teacher")):
        numbers = measured(section, context)
        model = numbers["models"][name]
        assert model["source"] == name and [layer["error"] for layer in model["layers"]] == [None] * 3
        assert all(layer["entropy"]["value"] > 0 for layer in model["layers"])
        assert not Layers.present(numbers).findings and len(Layers.present(numbers).plots) == 2
    ids = torch.tensor([eval_context(student).documents[1].tokens[:24]])
    names = [f"lm.{name}" for name in student.config.attention]
    calls = module_calls(student, {"input_ids": ids, "position_ids": torch.arange(24)[None]}, names)
    assert not torch.allclose(calls[names[2]].hidden, module_calls_of(teacher, ids, student.config.attention[2]))


def module_calls_of(teacher: Any, ids: torch.Tensor, name: str) -> torch.Tensor:
    return module_calls(teacher, {"input_ids": ids, "position_ids": torch.arange(24)[None]}, [name])[name].hidden


def test_text_without_a_document_to_look_at(teacher: Any) -> None:
    context = eval_context(teacher)
    with pytest.raises(InputError, match="no document has 8 tokens"):
        Layers().check(EvalContext(models=context.models, documents=[Document([1, 5, 2], [1, 1, 1])]))
