"""Alignment of layers with the teacher's, each on the teacher's own input: hidden states and mixing matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import LAYERS, mixer, student_of, tiny
from test_stages import T, make_batch, named, snapshot, train, trainable, untouched
from torch import Tensor
from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM
from linearize.ops.layout import Layout
from linearize.ops.softmax import softmax_attention
from linearize.training.config import Batch
from linearize.training.stages.hidden_alignment import HiddenAlignment, HiddenAlignmentConfig
from linearize.training.stages.matrix_alignment import MatrixAlignment, MatrixAlignmentConfig

MIXED = [mixer("mamba2"), None, mixer(window=3)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    """What is new in a mixer starts at random."""
    torch.manual_seed(0)


def align(student: LinearizedForCausalLM, original: PreTrainedModel, **settings: Any) -> HiddenAlignment:
    return HiddenAlignmentConfig(**{"tokens": 1, "lr": 1e-2, **settings}).build(student, original)  # type: ignore[return-value]


def match(student: LinearizedForCausalLM, original: PreTrainedModel) -> MatrixAlignment:
    return MatrixAlignmentConfig(tokens=1, lr=1e-2).build(student, original)  # type: ignore[return-value]


def live(batch: Batch) -> Tensor:
    counts = torch.zeros_like(batch["labels"], dtype=torch.bool)
    for row, n in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        counts[row, n] = True
    return counts


def straight_outputs(student: LinearizedForCausalLM, batch: Batch, output: str) -> dict[int, tuple[Tensor, Tensor]]:
    """(student, teacher) by layer of a Llama whose mixers are all `lolcats`, put together from its parts."""
    results: dict[int, tuple[Tensor, Tensor]] = {}
    inputs: dict[int, Tensor] = {}
    layers = student.lm.model.layers

    def finish(layer: int, y: Tensor) -> Tensor:
        added = layers[layer].self_attn.o_proj(y.transpose(1, 2).flatten(2))
        if output == "mixer":
            return added
        hidden = inputs[layer] + added
        return hidden + layers[layer].mlp(layers[layer].post_attention_layernorm(hidden))

    def attention_override(
        module: Any, q: Tensor, k: Tensor, v: Tensor, *, layout: Layout, sliding_window: Any, **scores: Any
    ):
        target = softmax_attention(q, k, v, layout=layout, sliding_window=sliding_window, **scores)
        y, _ = module.mixer(q, k, v, layout=layout, need_state=False, **scores)
        results[module.layer_idx] = (finish(module.layer_idx, y), finish(module.layer_idx, target))
        return target

    hooks = [
        layer.register_forward_pre_hook(lambda _module, args, i=i: inputs.update({i: args[0]}))
        for i, layer in enumerate(layers)
    ]
    student(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        use_cache=False,
        attention_override=attention_override,
    )
    for hook in hooks:
        hook.remove()
    return results


@pytest.mark.parametrize("output", ["mixer", "block"])
def test_the_error_is_that_of_each_layer_on_the_teachers_input(output: str) -> None:
    teacher, batch = tiny("llama"), make_batch()
    student = student_of(teacher, [mixer(window=3), None, mixer(window=5)])
    run = align(student, teacher, output=output, normalize="none")
    whole, gradients = run.loss(batch), {}
    whole.sum.backward()
    for name, p in named(run).items():
        gradients[name], p.grad = p.grad, None
    outputs, counts = straight_outputs(student, batch, output), live(batch)
    assert sorted(outputs) == [0, 2]
    expected: Any = sum((y - target)[counts].square().mean(-1).sum() for y, target in outputs.values())
    expected.backward()
    torch.testing.assert_close(whole.sum, expected, rtol=1e-4, atol=0)
    assert whole.count == int(counts.sum())
    for name, p in named(run).items():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-6)
    with torch.no_grad():  # a mixer that changes nothing above it: no error is passed on
        for name, p in named(run).items():
            if ".layers.0." in name:
                p.add_(1.0)
        after = run.layer_errors(batch)
        assert after[1] == pytest.approx(
            float(
                (outputs[2][0] - outputs[2][1])[counts].square().sum()
                / straight_added(outputs[2][1], student, batch, output)[counts].square().sum()
            ),
            rel=1e-4,
        )


def straight_added(target: Tensor, student: LinearizedForCausalLM, batch: Batch, output: str) -> Tensor:
    """What the teacher's last layer adds to the hidden states."""
    if output == "mixer":
        return target
    seen: list[Tensor] = []
    hook = student.lm.model.layers[LAYERS - 1].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    straight_outputs(student, batch, "mixer")
    hook.remove()
    return target - seen[0]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("output", ["mixer", "block"])
def test_a_window_over_the_text_has_no_error(family: str, output: str) -> None:
    changes: dict[str, Any] = {"layer_types": ["full_attention"] * LAYERS} if family == "gemma2" else {}
    teacher, batch = tiny(family, **changes), make_batch()
    student = student_of(teacher, [mixer(window=T), None, mixer(window=3)])
    exact, off = align(student, teacher, output=output).layer_errors(batch)
    assert exact < 1e-9
    assert off > 1e-3


@pytest.mark.parametrize("output", ["mixer", "block"])
def test_exactly_the_mixers_learn_and_the_teacher_does_not(output: str) -> None:
    teacher, batch = tiny("llama"), make_batch()
    student, before = student_of(teacher, MIXED), snapshot(teacher)
    mixers = {name for name, _ in student.named_parameters() if ".mixer." in name}
    run = align(student, teacher, output=output)
    run.calibrate(batch)
    assert set(named(run)) == trainable(student) == mixers
    assert {name.split(".mixer.")[0] for name in mixers} == {f"lm.model.layers.{i}.self_attn" for i in (0, 2)}
    start = {name: p.detach().clone() for name, p in named(run).items()}
    errors = run.layer_errors(batch)
    result = train(run, run.config, 25, batch, (batch,))
    assert result.losses[-1][1] < 0.8 * result.losses[0][1]
    assert all(after < e for after, e in zip(run.layer_errors(batch), errors, strict=True))
    assert all(not torch.equal(start[name], p) for name, p in named(run).items())
    assert untouched(teacher, before)
    assert trainable(student) == set()


@pytest.mark.parametrize("kind", ["hidden", "matrix"])
def test_losses_add_up_over_rows_and_ignore_padding(kind: str) -> None:
    teacher, batch = tiny("llama"), make_batch()
    student = student_of(teacher, [mixer("mamba2"), None, mixer("mamba2")])
    run: Any = align(student, teacher) if kind == "hidden" else match(student, teacher)
    run.calibrate(batch)
    whole = run.loss(batch)
    rows = [run.loss({key: value[i : i + 1] for key, value in batch.items()}) for i in range(3)]
    assert sum(row.count for row in rows) == whole.count == int(live(batch).sum())
    torch.testing.assert_close(sum(row.sum for row in rows), whole.sum, rtol=1e-5, atol=0)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 18:] = 5
    torch.testing.assert_close(run.loss(changed).sum, whole.sum, rtol=1e-5, atol=0)
    changed["input_ids"][0, 3] = 5
    assert abs(float(run.loss(changed).sum.detach() - whole.sum.detach())) > 1e-4
    whole.sum.backward()
    assert all(p.grad is not None for p in named(run).values())


def test_power_takes_out_the_scale_of_a_layer() -> None:
    """o of layer 1 times 7: its raw error grows by about 49, its normalised error does not."""
    batch, losses = make_batch(), {}
    for scale in (1.0, 7.0):
        teacher = tiny("llama")
        with torch.no_grad():
            teacher.model.layers[1].self_attn.o_proj.weight.mul_(scale)
        student = student_of(teacher, [None, mixer(window=3), None])
        for normalize in ("power", "none"):
            run = align(student, teacher, normalize=normalize)
            run.calibrate(batch)
            losses[scale, normalize] = float(run.loss(batch).sum.detach())
    assert losses[7.0, "none"] == pytest.approx(49 * losses[1.0, "none"], rel=1e-4)
    assert losses[7.0, "power"] == pytest.approx(losses[1.0, "power"], rel=1e-4)


def test_layers_without_parameters_are_left_out_and_alone_refused() -> None:
    teacher = tiny("llama")
    run = align(student_of(teacher, [mixer("sliding_window"), mixer(window=3), None]), teacher)
    assert len(run.layer_errors(make_batch())) == 1
    with pytest.raises(InputError, match="no mixer of the plan has parameters"):
        align(student_of(teacher, mixer("sliding_window")), teacher)


# Mixing matrices


def straight_matrices(teacher: PreTrainedModel, batch: Batch, layer: int) -> Tensor:
    """Attention weights as the teacher itself gives them, document by document."""
    rows = []
    for ids, position in zip(batch["input_ids"], batch["position_ids"], strict=True):
        starts = [n for n in range(T) if position[n] == 0]
        blocks = [
            teacher(ids[None, a:b], output_attentions=True).attentions[layer][0]
            for a, b in zip(starts, [*starts[1:], T], strict=True)
        ]
        whole = torch.stack([torch.block_diag(*heads) for heads in zip(*blocks, strict=True)])
        rows.append(whole)
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_loss_is_the_distance_of_the_matrices(family: str) -> None:
    """In gemma2 here two layers see 5 tokens and scores have a low softcap."""
    changes: dict[str, Any] = {"attn_logit_softcapping": 1.5} if family == "gemma2" else {}
    teacher, batch = tiny(family, **changes), make_batch()
    student = student_of(teacher, [mixer("mamba2"), mixer("mamba2"), None])
    actual, counts, expected = match(student, teacher).loss(batch), live(batch), torch.zeros(())
    hidden: dict[int, Tensor] = {}
    for i in (0, 1):
        teacher.model.layers[i].self_attn.register_forward_pre_hook(
            lambda _module, _args, kwargs, i=i: hidden.update({i: kwargs["hidden_states"]}), with_kwargs=True
        )
    with torch.no_grad():
        teacher(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        states = dict(hidden)
        for i in (0, 1):
            layout = Layout(position_BT=batch["position_ids"])
            matrix = student.mixers()[i].matrix(states[i], layout=layout)  # type: ignore[operator]
            error = (matrix - straight_matrices(teacher, batch, i)).square().sum(-1).mean(1)
            expected = expected + error[counts].sum()
    torch.testing.assert_close(actual.sum.detach(), expected, rtol=1e-4, atol=0)
    assert actual.count == int(counts.sum())


def test_matrices_learn_and_only_what_they_depend_on_trains() -> None:
    teacher, batch = tiny("llama"), make_batch()
    student, before = student_of(teacher, mixer("mamba2")), snapshot(teacher)
    run = match(student, teacher)
    names = {name.split(".mixer.")[1] for name in named(run)}
    assert names == {"in_proj.weight", "conv_weight", "conv_bias", "dt_bias", "A_log", "D"}
    assert trainable(student) == set(named(run))
    assert len(named(run)) == LAYERS * len(names)
    result = train(run, run.config, 40, batch, (batch,))
    assert result.losses[-1][1] < 0.8 * result.losses[0][1]
    assert untouched(teacher, before)
    assert trainable(student) == set()


def test_mixers_between_the_projections_have_no_matrix_stage() -> None:
    teacher = tiny("llama")
    with pytest.raises(InputError, match="not for lolcats: use attention_transfer with weights_ce"):
        match(student_of(teacher, MIXED), teacher)
