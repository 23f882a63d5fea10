"""The stages: what trains, what the losses are, and what stays untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import LAYERS, mixer, student_of, tiny
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import linearize
from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.io.student_folder import save_student
from linearize.ops.layout import Layout
from linearize.ops.softmax import softmax_attention
from linearize.training.config import Batch
from linearize.training.loop import run_stage
from linearize.training.stages import STAGES
from linearize.training.stages.attention_transfer import AttentionTransfer, AttentionTransferConfig
from linearize.training.stages.losses import kl_divergence, next_token_loss
from linearize.training.stages.lowrank import LowRank, LowRankConfig

T = 29
DOCUMENTS = ([13, 5, -11], [T], [4, 25])  # token counts of each row's documents; negative: padding


def make_batch(seed: int = 3, vocabulary: int = 61) -> Batch:
    """Packed rows with padding; some labels in the middle do not count."""
    ids = torch.randint(3, vocabulary, (len(DOCUMENTS), T), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    position = torch.stack([torch.cat([torch.arange(abs(n)) for n in row]) for row in DOCUMENTS])
    labels[position == 0] = -100
    labels[0, 18:] = -100
    labels[1, 7:10] = -100
    return {"input_ids": ids, "position_ids": position, "labels": labels}


def transfer(student: LinearizedForCausalLM, **settings: Any) -> AttentionTransfer:
    return AttentionTransferConfig(**{"tokens": 1, "lr": 1e-2, **settings}).build(student, None)  # type: ignore[return-value]


def lowrank(student: LinearizedForCausalLM, teacher: PreTrainedModel, **settings: Any) -> LowRank:
    return LowRankConfig(**{"tokens": 1, "lr": 1e-2, "rank": 3, **settings}).build(student, teacher)  # type: ignore[return-value]


def trainable(student: LinearizedForCausalLM) -> set[str]:
    return {name for name, parameter in student.named_parameters() if parameter.requires_grad}


def named(run: Any) -> dict[str, Tensor]:
    return {name: p for group in run.parameter_groups() for name, p in group.parameters.items()}


def train(run: Any, config: Any, steps: int, batch: Batch, heldout: tuple[Batch, ...] = ()) -> Any:
    """The project's own loop, the same batch in every step."""

    def batches(start: int) -> Any:
        while True:
            yield batch

    config = config.model_copy(update={"tokens": steps * T * 3, "batch": 3})
    return run_stage(run, config, batches, heldout, length=T)


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def untouched(model: torch.nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())


# Attention transfer


def test_transfer_trains_exactly_the_mixers() -> None:
    teacher = tiny("llama")
    student, before = student_of(teacher, [mixer(), None, mixer(window=3)]), snapshot(teacher)
    run = transfer(student)
    assert trainable(student) == set(named(run)) == {n for n in dict(student.named_parameters()) if ".mixer." in n}
    assert {name.split(".mixer.")[0] for name in named(run)} == {f"lm.model.layers.{i}.self_attn" for i in (0, 2)}
    start = {name: value.detach().clone() for name, value in named(run).items()}
    result = train(run, run.config, 40, make_batch())
    assert untouched(teacher, before)
    assert all(not torch.equal(start[name], value) for name, value in named(run).items())
    assert result.losses[-1][1] < 0.8 * result.losses[0][1]
    assert trainable(student) == set()


def test_transfer_passes_the_teachers_hidden_states_on() -> None:
    teacher, batch = tiny("llama", attention="sdpa"), make_batch()
    student = student_of(teacher, mixer(window=3))
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    seen: dict[int, Tensor] = {}

    def attention_override(
        module: Any, q: Tensor, k: Tensor, v: Tensor, *, layout: Layout, sliding_window: Any, **scores: Any
    ):
        seen[module.layer_idx] = module.mixer(q, k, v, layout=layout, **scores)[0]
        return softmax_attention(q, k, v, layout=layout, sliding_window=sliding_window, **scores)

    with torch.no_grad():
        expected = teacher(**inputs).logits
        torch.testing.assert_close(
            student(attention_override=attention_override, **inputs).logits, expected, rtol=0, atol=2e-5
        )
        assert (student(**inputs).logits - expected).abs().max() > 0.1
    assert sorted(seen) == list(range(LAYERS))


def test_the_squared_error_is_that_of_each_layers_own_input() -> None:
    """Against hooks on the teacher's modules: layer i's error does not depend on the mixers of other layers."""
    teacher, batch = tiny("llama", attention="sdpa"), make_batch()
    student, other = student_of(teacher, mixer(window=3)), student_of(teacher, [None, mixer(window=3), None])
    with torch.no_grad():
        for name, value in student.mixer_parameters().items():
            if ".layers.1." in name:
                dict(other.named_parameters())[name].copy_(value)
        assert transfer(student).layer_errors(batch)[1] == pytest.approx(transfer(other).layer_errors(batch)[0])
        assert min(transfer(student).layer_errors(batch)) > 0.01


def test_layer_errors_vanish_for_a_window_over_the_text() -> None:
    for family in ("llama", "gemma2"):
        student = student_of(tiny(family, layer_types=["full_attention"] * LAYERS), mixer(window=T))
        assert len(student.mixers()) == LAYERS
        assert max(transfer(student).layer_errors(make_batch())) < 1e-9


def test_the_loss_is_a_sum_over_tokens_that_count() -> None:
    batch, student = make_batch(), student_of(tiny("llama"), mixer(window=3))
    run = transfer(student, weights_ce=0.3)
    run.calibrate(batch)
    whole = run.loss(batch)
    expected = sum(len([n for n in range(1, T) if batch["labels"][row, n] != -100]) for row in range(3))
    assert whole.count == expected
    assert whole.sum.dtype == torch.float32
    rows = [run.loss({key: value[i : i + 1] for key, value in batch.items()}) for i in range(3)]
    assert sum(row.count for row in rows) == whole.count
    torch.testing.assert_close(sum(row.sum for row in rows), whole.sum, rtol=1e-5, atol=0)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 18:] = 5
    torch.testing.assert_close(run.loss(changed).sum, whole.sum, rtol=1e-6, atol=0)


def straight_weights(student: LinearizedForCausalLM, batch: Batch, window: int | None = None) -> Tensor:
    """Attention-weight cross-entropy from full matrices built token by token, with the terraced window of 3."""
    total = torch.zeros((), dtype=torch.float64)
    counted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100

    def attention_override(
        module: Any, q: Tensor, k: Tensor, v: Tensor, *, layout: Layout, sliding_window: Any, **scores: Any
    ):
        nonlocal total
        position, heads = batch["position_ids"], q.shape[1]
        phi_q, phi_k = module.mixer.feature_q(q), module.mixer.feature_k(k)
        key = k.repeat_interleave(heads // k.shape[1], dim=1)
        for b, n in counted.nonzero().tolist():
            p = int(position[b, n])
            first = n - p
            s = (q[b, :, None, n] * key[b, :, first : n + 1]).sum(-1).double() * scores["scaling"]
            seen = torch.tensor([window is None or p - j < window for j in range(p + 1)])
            a = s.masked_fill(~seen, -torch.inf).softmax(-1)
            near = torch.tensor([p // 3 - j // 3 <= 1 for j in range(p + 1)])
            top = s.masked_fill(~near, -torch.inf).amax(-1, keepdim=True)
            g = module.mixer.window_factor_H.sigmoid().double()[:, None]
            linear = (phi_q[b, :, None, n] * phi_k[b, :, first : n + 1]).sum(-1).double()
            w = torch.where(near, g * (s - top).exp(), linear)
            total = total - (a * (w / w.sum(-1, keepdim=True)).log()).sum(-1).mean()
        return softmax_attention(q, k, v, layout=layout, sliding_window=sliding_window, **scores)

    with torch.no_grad():
        student(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            use_cache=False,
            attention_override=attention_override,
        )
    return total


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_weight_cross_entropy_equals_full_matrices(family: str) -> None:
    """In mistral here the teacher sees 5 tokens: a target that looks further would be another number."""
    batch, limit = make_batch(), {"mistral": 5}.get(family)
    student = student_of(tiny(family), mixer(window=3))
    run = transfer(student, mse=0.0, weights_ce=0.7)
    result = run.loss(batch)
    torch.testing.assert_close(
        result.sum.double(), 0.7 * straight_weights(student, batch, limit), rtol=1e-4, atol=0, check_dtype=False
    )
    result.sum.backward()
    assert all(parameter.grad is not None for parameter in named(run).values())


def test_power_normalisation_takes_out_the_scale_of_a_layer() -> None:
    """v of layer 1 times 7: its raw error grows by 49, its normalised error does not."""
    batch, losses = make_batch(), {}
    for scale in (1.0, 7.0):
        teacher = tiny("llama", attention="sdpa")
        with torch.no_grad():
            teacher.model.layers[1].self_attn.v_proj.weight.mul_(scale)
        student = student_of(teacher, [None, mixer(window=3), None])
        for normalize in ("power", "none"):
            run = transfer(student, normalize=normalize)
            run.calibrate(batch)
            losses[scale, normalize] = float(run.loss(batch).sum.detach())
    assert losses[7.0, "power"] == pytest.approx(losses[1.0, "power"], rel=1e-4)
    assert losses[7.0, "none"] == pytest.approx(49 * losses[1.0, "none"], rel=1e-4)


def test_transfer_without_anything_to_train_is_refused() -> None:
    with pytest.raises(InputError, match="no mixer of the plan has parameters"):
        transfer(student_of(tiny("llama"), mixer("sliding_window")))
    with pytest.raises(ValueError, match="mse and weights_ce are both 0"):
        AttentionTransferConfig(tokens=1, lr=1.0, mse=0.0, weights_ce=0.0)


# Losses on logits


def test_losses_equal_full_computation_with_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.training.stages.chunked_logits.SLICE_NUMBERS", 7 * 61)
    batch, generator = make_batch(), torch.Generator().manual_seed(1)
    p, q = (torch.randn(3, T, 61, generator=generator) * 2 for _ in "pq")
    cross, divergence, count = 0.0, 0.0, 0
    for row in range(3):
        for n in range(T - 1):
            if batch["labels"][row, n + 1] == -100:
                continue
            a, b = p[row, n].double().softmax(-1), q[row, n].double().softmax(-1)
            cross -= float(b[batch["labels"][row, n + 1]].log())
            divergence += float((a * (a / b).log()).sum())
            count += 1
    ce, kl = next_token_loss(q, batch["labels"]), kl_divergence(p, q, batch["labels"])
    assert ce.count == kl.count == count
    assert float(ce.sum) == pytest.approx(cross, rel=1e-5)
    assert float(kl.sum) == pytest.approx(divergence, rel=1e-5)
    assert float(kl_divergence(p, p, batch["labels"]).sum) == 0
    nothing = torch.full_like(batch["labels"], -100)
    assert kl_divergence(p, q, nothing).count == next_token_loss(q, nothing).count == 0
    assert float(next_token_loss(q, nothing).sum) == float(kl_divergence(p, q, nothing).sum) == 0


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_a_student_that_is_its_teacher(loss: str) -> None:
    teacher, batch = tiny("llama", attention="sdpa"), make_batch()
    run = lowrank(student_of(teacher, mixer(window=T)), teacher, loss=loss)
    with torch.no_grad():
        result = run.loss(batch)
    if loss == "kl":
        assert abs(float(result.sum)) / result.count < 1e-6
    else:
        logits = teacher(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        assert float(result.sum) == pytest.approx(float(next_token_loss(logits, batch["labels"]).sum), rel=1e-5)


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_gradients_do_not_depend_on_micro_batches(loss: str) -> None:
    teacher, batch = tiny("llama"), make_batch()
    gradients = []
    for size in (3, 1):
        torch.manual_seed(0)
        run = lowrank(student_of(teacher, mixer(window=3)), teacher, loss=loss, train_mixers=True)
        results = [run.loss({k: v[i : i + size] for k, v in batch.items()}) for i in range(0, 3, size)]
        (sum(x.sum for x in results) / sum(x.count for x in results)).backward()
        gradients.append({name: p.grad for name, p in named(run).items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


# Low-rank linearizing


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q", "k", "v", "o"), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (("v",), {"v_proj"}),
        (("o", "up_proj"), {"o_proj", "up_proj"}),
        (("all",), {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
@pytest.mark.parametrize("train_mixers", [False, True])
def test_lowrank_trains_exactly_what_it_names(targets: tuple, expected: set, train_mixers: bool) -> None:
    teacher = tiny("llama")
    student = student_of(teacher, [mixer(), None, mixer()])
    mixers = set(student.mixer_parameters())
    run = lowrank(student, teacher, targets=targets, train_mixers=train_mixers, mixer_lr_scale=0.25)
    names = set(named(run))
    adapters = {name for name in names if ".lora_" in name}
    assert trainable(student) == names
    assert names - adapters == (mixers if train_mixers else set())
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in adapters} == expected
    assert len(adapters) == 2 * len(expected) * LAYERS
    assert [group.lr_scale for group in run.parameter_groups()] == ([1.0, 0.25] if train_mixers else [1.0])
    assert sum(p.numel() for n, p in named(run).items() if n in adapters and "lora_A" in n) == 3 * sum(
        m.in_features for n, m in student.named_modules() if n.rpartition(".")[2] in expected
    )


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_training_and_merging_leave_the_teacher_alone(family: str) -> None:
    teacher, batch = tiny(family, sliding_window=None) if family == "phi3" else tiny(family), make_batch()
    before, student = snapshot(teacher), student_of(teacher, mixer(window=3))
    run = lowrank(student, teacher, loss="kl", train_mixers=True, alpha=5)
    bare = student_logits(student, batch)
    result = train(run, run.config, 25, batch)
    assert result.losses[-1][1] < 0.9 * result.losses[0][1]
    assert untouched(teacher, before)
    assert (student_logits(student, batch) - bare).abs().max() > 0.05
    assert not [name for name in dict(student.named_modules()) if "lora" in name]
    assert trainable(student) == set()


def student_logits(student: LinearizedForCausalLM, batch: Batch) -> Tensor:
    with torch.no_grad():
        return student(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


def with_adapters(seed: int = 4, **settings: Any) -> tuple[LinearizedForCausalLM, LowRank]:
    """A student whose adapters are far from zero."""
    teacher = tiny("llama", attention="sdpa")
    student = student_of(teacher, mixer(window=3))
    run = lowrank(student, teacher, alpha=5, targets=("q", "o", "down_proj"), **settings)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in named(run).values():
            parameter.normal_(std=0.2)
    return student, run


def test_merged_is_unmerged() -> None:
    batch, (student, run) = make_batch(), with_adapters()
    expected = student_logits(student, batch)
    torch.testing.assert_close(run.heldout_loss(batch).sum, next_token_loss(expected, batch["labels"]).sum)
    run.finish()
    torch.testing.assert_close(student_logits(student, batch), expected, rtol=0, atol=5e-5)


class NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """Nothing to save."""


def test_adapters_kept_beside_the_weights_are_applied_on_loading(tmp_path: Path) -> None:
    batch, (student, run) = make_batch(), with_adapters(merge=False)
    bare = student_logits(student_of(tiny("llama", attention="sdpa"), mixer(window=3)), batch)
    expected = student_logits(student, batch)
    run.finish()
    torch.testing.assert_close(student_logits(student, batch), expected, rtol=0, atol=5e-5)
    save_student(student, NoTokenizer(), tmp_path)
    torch.testing.assert_close(student_logits(student, batch), expected, rtol=0, atol=5e-5)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        name = "lm.model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(file.get_tensor(name), tiny("llama").state_dict()[name.removeprefix("lm.")])
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    loaded = linearize.load(tmp_path)
    torch.testing.assert_close(student_logits(loaded, batch), expected, rtol=0, atol=5e-5)
    assert (expected - bare).abs().max() > 0.1
    from transformers import AutoModelForCausalLM

    torch.testing.assert_close(
        student_logits(AutoModelForCausalLM.from_pretrained(tmp_path), batch), expected, rtol=0, atol=5e-5
    )


def test_lora_over_bf16_weights_takes_steps_that_bf16_would_round_away() -> None:
    teacher, batch = tiny("llama").to(torch.bfloat16), make_batch()
    run = lowrank(student_of(teacher, mixer(window=3)), teacher, loss="kl", lr=1e-5)
    before = {name: p.detach().clone() for name, p in named(run).items() if "lora_A" in name}
    assert {p.dtype for p in named(run).values()} == {torch.float32}
    result = train(run, run.config, 4, batch)
    moved = torch.cat([(p != before[name]).flatten() for name, p in named(run).items() if name in before])
    assert result.losses[-1][1] > 0 and moved.float().mean() > 0.9
    assert {p.dtype for p in run.student.parameters() if p.dim() == 2} == {torch.bfloat16}  # as merged


def test_dropout_is_off_for_held_out_text_and_on_for_training() -> None:
    batch, (_, run) = make_batch(), with_adapters(dropout=0.5)
    assert float(run.heldout_loss(batch).sum) == float(run.heldout_loss(batch).sum)
    torch.manual_seed(1)
    assert float(run.loss(batch).sum) != float(run.loss(batch).sum)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    teacher, batch, gradients = tiny("llama"), make_batch(), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        run = lowrank(student_of(teacher, mixer(window=3)), teacher, train_mixers=True)
        if checkpointing:
            run.enable_gradient_checkpointing()
        run.loss(batch).sum.backward()
        gradients.append({name: p.grad for name, p in named(run).items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][name], gradient)


def test_an_unknown_target_names_what_there_is() -> None:
    teacher = tiny("llama")
    with pytest.raises(InputError, match=r"'qq' names no projection.*q, k, v, o, all.*down_proj.*q_proj"):
        lowrank(student_of(teacher, mixer()), teacher, targets=("q", "qq"))


def test_every_stage_is_in_the_table() -> None:
    assert {name: cls.model_fields["name"].default for name, cls in STAGES.items()} == {n: n for n in STAGES}


@pytest.mark.parametrize("weights_ce", [0.0, 0.3])
def test_gradients_of_the_transfer_are_those_of_the_sum_over_layers(weights_ce: float) -> None:
    student = student_of(tiny("llama", attention="sdpa"), [mixer("lolcats"), None, mixer("lolcats")])
    run = AttentionTransfer(AttentionTransferConfig(tokens=1, lr=1.0, weights_ce=weights_ce), student)
    batch = make_batch()
    run.calibrate(batch)
    terms = run._pass(batch)
    assert len(terms) == 2
    expected = sum(term for term, _ in terms.values())
    parameters = named(run)
    gradients = torch.autograd.grad(expected, list(parameters.values()), torch.tensor(0.7))
    loss = run.loss(batch)
    (0.7 * loss.sum).backward()
    torch.testing.assert_close(loss.sum, expected)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max()))
