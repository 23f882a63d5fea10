"""Distillation: losses over slices of tokens, what trains, whose memory it is, and another teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, LAYERS, VOCABULARY, mixer, student_of, tiny
from test_stages import T, make_batch, named, snapshot, train, trainable, untouched
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedModel

from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM
from linearize.training.config import Batch, LossSum
from linearize.training.stages.chunked_logits import SplitModel, slice_tokens, without_head
from linearize.training.stages.distill import Distill, DistillConfig
from linearize.training.stages.losses import distillation_loss, divergence
from linearize.training.stages.lowrank import LowRankConfig

PLAN = [mixer(window=3), None, mixer(window=3)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    """What is new in a mixer starts at random."""
    torch.manual_seed(0)


def distill(student: LinearizedForCausalLM, original: PreTrainedModel, **settings: Any) -> Distill:
    return DistillConfig(**{"tokens": 1, "lr": 1e-2, **settings}).build(student, original)  # type: ignore[return-value]


def whole_logits(model: Any, batch: Batch) -> Tensor:
    logits: Tensor = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return logits


def straight_loss(
    teacher: Tensor, student: Tensor, batch: Batch, *, kl: float, ce: float, kind: str = "forward", heat: float = 1.0
) -> Tensor:
    """Token by token from whole logits, each divergence by its definition on probabilities."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(len(batch["labels"])):
        for n in range(T - 1):
            label = int(batch["labels"][row, n + 1])
            if label == -100:
                continue
            p, q = ((x[row, n].double() / heat).softmax(-1) for x in (teacher, student))
            middle = (p + q) / 2
            kinds = {
                "forward": (p * (p / q).log()).sum(),
                "reverse": (q * (q / p).log()).sum(),
                "jsd": ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2,
            }
            total = total + kl * heat**2 * kinds[kind] - ce * student[row, n].double().softmax(-1)[label].log()
    return total


# Logits of a slice


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_head_give_the_familys_logits(family: str) -> None:
    """Softcaps, scales and projections before the head are the family's own."""
    teacher, batch = tiny(family), make_batch()
    split = SplitModel(teacher)
    with torch.no_grad():
        hidden = split.hidden(batch)
        assert split.decoder is not None
        assert hidden.shape[-1] != VOCABULARY
        result = split.logits(hidden[:, 4:9].flatten(0, 1))
        torch.testing.assert_close(result, whole_logits(teacher, batch)[:, 4:9].flatten(0, 1), rtol=1e-5, atol=1e-6)


class Odd(LlamaForCausalLM):
    """Logits that hidden states alone do not give."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        output = super().forward(input_ids, **options)
        output.logits = output.logits + 0.3 * input_ids[:, -output.logits.shape[1] :, None]
        return output


def test_a_model_that_does_not_come_apart_gives_whole_logits() -> None:
    batch, teacher, student = make_batch(), tiny("llama"), student_of(tiny("llama", seed=8), PLAN)
    odd = Odd(teacher.config)
    odd.load_state_dict(teacher.state_dict())
    assert SplitModel(odd.eval()).decoder is None
    with torch.no_grad():
        actual = distillation_loss(SplitModel(student), SplitModel(odd), batch, kl=1.0, ce=0.0)
        expected = straight_loss(whole_logits(odd, batch), whole_logits(student, batch), batch, kl=1.0, ce=0.0)
    assert float(actual.sum) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("cached", [3 * VOCABULARY, 2**18])
def test_divergences_by_their_definitions(kind: Any, cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens at once, or a few at a time."""
    monkeypatch.setattr("linearize.training.stages.losses.CACHED", cached)
    generator = torch.Generator().manual_seed(2)
    p, q = (2 * torch.randn(3, T, VOCABULARY, generator=generator) for _ in "pq")
    batch = make_batch()
    expected = straight_loss(p, q, batch, kl=1.0, ce=0.0, kind=kind, heat=1.7)
    live = F.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    logits = q[live].requires_grad_()
    actual = divergence(p[live], logits, kind, temperature=1.7)
    assert float(actual.detach()) == pytest.approx(float(expected), rel=1e-5)
    (0.6 * actual).backward()
    whole = q.double().requires_grad_()
    (0.6 * straight_loss(p.double(), whole, batch, kl=1.0, ce=0.0, kind=kind, heat=1.7)).backward()
    torch.testing.assert_close(logits.grad, whole.grad[live].float(), rtol=1e-4, atol=1e-6)
    assert abs(float(divergence(p[live], p[live], kind))) < 1e-4


def test_a_cpu_has_slices_of_memory_that_is_used_again() -> None:
    """glibc gives blocks above 32 MiB back to the system."""
    for vocabulary in (50, 49_152, 262_144):
        cpu = 4 * vocabulary * slice_tokens(vocabulary, torch.empty(1))
        assert 30e6 < cpu < 32 * 2**20
        assert 2 * cpu < 4.3 * vocabulary * slice_tokens(vocabulary, torch.empty(1, device="meta")) <= 1.1 * 2**26


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere2"])
@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_slices_give_the_whole_loss_and_its_gradients(family: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything trains, tied head and embedding (gemma2, cohere2) included; 5 tokens at a time."""
    monkeypatch.setattr("linearize.training.stages.chunked_logits.SLICE_NUMBERS", 5 * VOCABULARY + 3)
    batch, teacher = make_batch(), tiny(family, tie_word_embeddings=family in ("gemma2", "cohere2"))
    student = student_of(tiny(family, seed=8, tie_word_embeddings=family in ("gemma2", "cohere2")), PLAN)
    student.requires_grad_(True)
    options: dict[str, Any] = {"kl": 0.7, "ce": 0.4}
    split, sizes = SplitModel(student), []
    logits = split.logits
    monkeypatch.setattr(split, "logits", lambda hidden: (sizes.append(len(hidden)), logits(hidden))[1])
    actual = distillation_loss(split, SplitModel(teacher), batch, kind=kind, temperature=1.3, **options)
    (3 * actual.sum).backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad()
    with torch.no_grad():
        target = whole_logits(teacher, batch)
    expected = straight_loss(target, whole_logits(student, batch), batch, kind=kind, heat=1.3, **options)
    (3 * expected).backward()
    torch.testing.assert_close(actual.sum.double(), expected, rtol=1e-5, atol=0)
    assert actual.count == sum(sizes)
    assert set(sizes[:-1]) == {5}
    assert len(sizes) > 3
    for name, p in student.named_parameters():
        assert (gradients[name] is None) == (p.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=2e-5)


def test_under_autocast_a_frozen_head_is_copied_once() -> None:
    """Two slices and two steps use one copy; a head that trains is left to autocast; outside, nothing is exchanged."""
    teacher = tiny("llama")
    split, head = SplitModel(teacher.requires_grad_(False)), teacher.lm_head.weight
    hidden = torch.randn(7, head.shape[1], generator=torch.Generator().manual_seed(3))
    exact = split.logits(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        first = split.logits(hidden)
        copies = [copy for _, copy in split._halved.values()]
        assert [(copy.dtype, copy.shape) for copy in copies] == [(torch.bfloat16, head.shape)]
        assert torch.equal(split.logits(hidden), first)
        assert all(copy is before for (_, copy), before in zip(split._halved.values(), copies, strict=True))
        assert first.dtype == torch.bfloat16
    assert teacher.lm_head.weight is head
    assert torch.equal(split.logits(hidden), exact)
    torch.testing.assert_close(first.float(), exact, rtol=0.05, atol=0.05)
    teacher.lm_head.weight = torch.nn.Parameter(2 * head)
    trained = SplitModel(teacher)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(trained.logits(hidden), 2 * first, rtol=0.05, atol=0.05)
    assert not trained._halved


def test_without_head_a_model_ends_at_its_hidden_states() -> None:
    teacher, batch = tiny("llama"), make_batch()
    head = teacher.lm_head
    with torch.no_grad(), without_head(teacher):
        assert whole_logits(teacher, batch).shape[-1] == teacher.config.hidden_size
    assert teacher.lm_head is head
    with pytest.raises(ZeroDivisionError), without_head(teacher):
        raise ZeroDivisionError
    assert teacher.lm_head is head


def test_bf16_gives_the_gradients_of_whole_logits() -> None:
    """Autocast keeps casts of weights: none made without a gradient may be used with one."""
    batch, teacher = make_batch(), tiny("llama")
    run, gradients = distill(student_of(teacher, PLAN), teacher, train="all", kl=0.7), []
    for sliced in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            if sliced:
                loss = run.loss(batch).sum
            else:
                with torch.no_grad():
                    target = whole_logits(teacher, batch)
                loss = straight_loss(target, whole_logits(run.student, batch), batch, kl=0.7, ce=1.0)
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in named(run).items() if p.grad is not None})
        run.student.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() == named(run).keys()
    for name, gradient in gradients[1].items():
        assert (gradients[0][name] - gradient).norm() < 0.05 * gradient.norm(), name


def test_nothing_that_counts_gives_zero() -> None:
    batch, teacher = make_batch(), tiny("llama")
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    result = distill(student_of(teacher, PLAN), teacher).loss(nothing)
    result.sum.backward()
    assert (result.sum.item(), result.count) == (0, 0)


# What trains


def is_mlp(name: str) -> bool:
    return any(part in name for part in (".mlp.", ".fc1.", ".fc2."))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "opt", "qwen3_moe"])
@pytest.mark.parametrize("what", ["mixers", "no_mlp", "all"])
def test_exactly_the_named_parameters_train(family: str, what: str) -> None:
    teacher = tiny(family)
    student = student_of(teacher, PLAN)
    everything = set(dict(student.named_parameters()))
    new = {name for name in everything if ".mixer." in name}
    old = {"mixers": set(), "all": everything - new, "no_mlp": {n for n in everything - new if not is_mlp(n)}}[what]
    assert 0 < len([n for n in everything if is_mlp(n)]) < len(everything)
    run = distill(student, teacher, train=what, old_lr_scale=0.3)
    groups = run.parameter_groups()
    assert [(set(g.parameters), g.lr_scale) for g in groups] == [(new, 1.0), (old, 0.3)][: len(groups)]
    assert len(groups) == 1 + bool(old)
    assert trainable(student) == new | old
    run.loss(make_batch()).sum.backward()
    for name, p in student.named_parameters():
        expert = family == "qwen3_moe" and is_mlp(name)  # which experts see a token is chance
        assert expert or (p.grad is not None) == (name in new | old), name
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    run.finish()
    assert trainable(student) == set()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("what", ["no_mlp", "all"])
def test_the_teacher_does_not_move(what: str, tied: bool) -> None:
    teacher, batch = tiny("llama", tie_word_embeddings=tied), make_batch()
    before, shared = snapshot(teacher), {p.data_ptr() for p in teacher.parameters()}
    with torch.no_grad():
        logits = whole_logits(teacher, batch)
    student = student_of(teacher, PLAN)
    run = distill(student, teacher, train=what, kl=1.0, ce=0.5)
    start = {name: p.detach().clone() for name, p in named(run).items()}
    result = train(run, run.config, 12, batch, (batch,))
    assert result.losses[-1][1] < 0.9 * result.losses[0][1]
    assert untouched(teacher, before)
    with torch.no_grad():
        assert torch.equal(whole_logits(teacher, batch), logits)
    changed = [name for name, value in start.items() if not torch.equal(value, dict(student.named_parameters())[name])]
    assert len(changed) == len(start)
    embedding, head = student.get_input_embeddings().weight, student.get_output_embeddings().weight
    assert (embedding is head) == tied
    frozen = {p.data_ptr() for n, p in student.named_parameters() if n not in start}
    assert frozen <= shared
    assert (what == "all") == (not frozen)


def test_a_second_stage_continues_with_the_same_copies() -> None:
    teacher = tiny("llama")
    student = student_of(teacher, PLAN)
    first = named(distill(student, teacher, train="all"))
    second = named(distill(student, teacher, train="all"))
    assert all(second[name] is value for name, value in first.items())


def test_gradients_do_not_depend_on_micro_batches_or_checkpointing() -> None:
    teacher, batch, gradients = tiny("llama"), make_batch(), []
    for size, recompute in ((3, False), (1, False), (3, True)):
        run = distill(student_of(teacher, PLAN), teacher, train="all", kl=1.0, gradient_checkpointing=recompute)
        if recompute:
            run.enable_gradient_checkpointing()
        results = [run.loss({k: v[i : i + size] for k, v in batch.items()}) for i in range(0, 3, size)]
        total: Any = sum(x.sum for x in results) / sum(x.count for x in results)
        total.backward()
        gradients.append({name: p.grad for name, p in named(run).items()})
        run.finish()
    for name, gradient in gradients[0].items():
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-6)


def test_what_cannot_train_is_refused() -> None:
    teacher = tiny("llama")
    with pytest.raises(InputError, match="no mixer of the plan has parameters"):
        distill(student_of(teacher, mixer("sliding_window")), teacher)
    with pytest.raises(ValueError, match="kl and ce are both 0"):
        DistillConfig(tokens=1, lr=1.0, kl=0, ce=0)
    student = student_of(teacher, PLAN)
    LowRankConfig(tokens=1, lr=1.0, rank=2, merge=False).build(student, teacher).finish()
    with pytest.raises(InputError, match="set merge of lowrank to true"):
        distill(student, teacher)


# Another teacher


def tokenizer(folder: Path, *, swapped: bool = False) -> None:
    """A word per id below the vocabulary's size; `swapped`: two of them the other way round."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCABULARY)}
    if swapped:
        words |= {"w7": 8, "w8": 7}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0").save_pretrained(folder)


@pytest.fixture
def own_tokenizer(tmp_path: Path) -> str:
    folder = tmp_path / "student-tokenizer"
    tokenizer(folder)
    tiny("llama").config.save_pretrained(folder)
    return str(folder)


def saved(folder: Path, *, swapped: bool = False, **changes: Any) -> str:
    tiny("llama", seed=9, **{"hidden_size": 42, "num_hidden_layers": LAYERS + 1, **changes}).save_pretrained(folder)
    tokenizer(folder, swapped=swapped)
    return str(folder)


def student_named(name: str | None) -> tuple[LinearizedForCausalLM, PreTrainedModel]:
    teacher = tiny("llama")
    return LinearizedForCausalLM.from_teacher(teacher, PLAN, teacher_name=name), teacher


@pytest.mark.parametrize("padding", [0, 6])
def test_another_larger_teacher(tmp_path: Path, own_tokenizer: str, padding: int) -> None:
    """Its vocabulary may be padded to another size where the tokenizers are the same."""
    name, batch = saved(tmp_path / "large", vocab_size=VOCABULARY + padding), make_batch()
    student, teacher = student_named(own_tokenizer)
    other = LlamaForCausalLM.from_pretrained(name)
    run = distill(student, teacher, teacher=name, kl=1.0, ce=0.0)
    with torch.no_grad():
        actual: LossSum = run.heldout_loss(batch)
        target, now = whole_logits(other, batch), whole_logits(student, batch)
    expected = straight_loss(target[..., :VOCABULARY], now, batch, kl=1.0, ce=0.0)
    assert float(actual.sum) == pytest.approx(float(expected), rel=1e-4)
    run.finish()
    assert run.teacher_split is None


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path: Path, own_tokenizer: str) -> None:
    student, teacher = student_named(own_tokenizer)
    swapped = DistillConfig(tokens=1, lr=1.0, teacher=saved(tmp_path / "swapped", swapped=True))
    with pytest.raises(InputError, match=r"swapped has another vocabulary: its tokenizer maps 61.*the student's 61"):
        swapped.check(student, teacher)
    bare, _ = student_named(None)
    sized = DistillConfig(tokens=1, lr=1.0, teacher=saved(tmp_path / "sized", vocab_size=VOCABULARY + 6))
    with pytest.raises(InputError, match="sized has another vocabulary: 67 tokens, the student has 61; give") as error:
        sized.build(bare, teacher)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="is not a model folder"):
        DistillConfig(tokens=1, lr=1.0, teacher=str(tmp_path / "nothing")).check(student, teacher)
