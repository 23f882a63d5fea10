"""SFT: next-token loss on answers alone, divided once a batch; killed and resumed without a trace."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import CHAT, byte_tokenizer
from dataset_stage_jobs import Killed, Watcher, changed, job, step_by_hand, weights
from models import VOCABULARY, tiny
from torch.nn import functional as F

from linearize.errors import InputError
from linearize.modeling.io.adapters import AdapterState
from linearize.training.checkpoint import FILE, PREVIOUS
from linearize.training.data.documents import Document
from linearize.training.dataset_stage import count_steps, row_order
from linearize.training.stages import STAGES
from linearize.training.stages.chunked_logits import SplitModel
from linearize.training.stages.losses import answer_log_probs, answer_loss
from linearize.training.stages.sft import SftConfig

ROWS = [
    {"messages": [{"role": "user", "content": "a" * i}, {"role": "assistant", "content": "b" * (1 + 3 * i % 7)}]}
    for i in range(1, 6)
]
TALK = {
    "messages": [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
}


def config(folder: Path, rows: Any = (*ROWS, TALK), **settings: Any) -> SftConfig:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(list(rows)), encoding="utf-8")
    usual: dict[str, Any] = {"lr": 2e-3, "batch": 4, "epochs": 3, "evaluate_every": 2, "warmup": 2, "weight_decay": 0.1}
    return SftConfig(data=str(folder / "rows.json"), **{**usual, **settings})


def counted(document: Document) -> str:
    """The text whose loss counts."""
    pairs = zip(document.tokens, document.loss_mask, strict=True)
    return str(byte_tokenizer().decode([token for token, counts in pairs if counts]))


def sft_by_hand(work: Any, settings: SftConfig, steps: int) -> list[float]:
    """Losses of each step, row by row without padding; trains the job's student."""
    parameters = [parameter.requires_grad_(True) for parameter in work.student.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=settings.betas, weight_decay=settings.weight_decay)
    documents, losses = settings.rows(work.tokenizer, work.context), []
    order = row_order(len(documents), steps * settings.batch, work.seed + settings.seed)
    for step in range(steps):
        rows = [documents[row] for row in order[step * settings.batch : (step + 1) * settings.batch]]
        total, count = torch.zeros(()), 0
        for document in rows:
            ids, mask = torch.tensor(document.tokens), torch.tensor(document.loss_mask[1:]).bool()
            logits = work.student(ids[None], use_cache=False).logits[0, :-1]
            total = total + F.cross_entropy(logits[mask], ids[1:][mask], reduction="sum")
            count += int(mask.sum())
        (total / count).backward()
        losses.append(float(total.detach()) / count)
        step_by_hand(parameters, optimizer, settings, step, steps)
    return losses


def test_each_step_is_the_mean_over_all_answer_tokens_of_the_batch(tmp_path: Path) -> None:
    settings = config(tmp_path, micro_batch=3, max_steps=3)
    by_hand = job(tmp_path / "hand", tokenizer=byte_tokenizer(chat=CHAT))
    expected = sft_by_hand(by_hand, settings, 3)
    work = job(tmp_path / "run", tokenizer=byte_tokenizer(chat=CHAT))
    teacher, before = weights(work.teacher), weights(work.student)
    result = settings.run(work)
    assert [loss for _, loss in result.losses] == pytest.approx(expected, rel=1e-4)
    after, target = weights(work.student), weights(by_hand.student)
    assert max(float((after[name] - target[name]).abs().max()) for name in after) < 4e-4
    assert changed(before, after) == set(before)
    assert not changed(teacher, weights(work.teacher))


def test_killed_and_resumed_is_bit_equal_to_unbroken(tmp_path: Path) -> None:
    settings = config(tmp_path, epochs=2.5)
    whole = job(tmp_path / "whole", tokenizer=byte_tokenizer(chat=CHAT))
    expected = settings.run(whole)
    assert expected.steps == 4 and expected.losses[-1][1] < expected.losses[0][1]
    with pytest.raises(Killed):
        settings.run(job(tmp_path / "killed", progress=Watcher(3), tokenizer=byte_tokenizer(chat=CHAT)))
    again = job(tmp_path / "killed", progress=Watcher(), tokenizer=byte_tokenizer(chat=CHAT))
    result = settings.run(again)
    assert again.progress.begun == [("sft", 2, 4)] and again.progress.steps == [3, 4]
    assert not changed(weights(whole.student), weights(again.student))
    assert (result.losses, result.metrics, result.tokens) == (expected.losses, expected.metrics, expected.tokens)


@pytest.mark.parametrize(("damaged", "resumed"), [([FILE], 2), ([FILE, PREVIOUS], 0)])
def test_a_damaged_checkpoint_is_never_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: list[str], resumed: int
) -> None:
    settings = config(tmp_path, epochs=2.5, evaluate_every=0.25)
    whole = job(tmp_path / "whole", tokenizer=byte_tokenizer(chat=CHAT))
    settings.run(whole)
    with pytest.raises(Killed):
        settings.run(job(tmp_path / "killed", progress=Watcher(4), tokenizer=byte_tokenizer(chat=CHAT)))
    for name in damaged:
        path = tmp_path / "killed" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    again = job(tmp_path / "killed", progress=Watcher(), tokenizer=byte_tokenizer(chat=CHAT))
    settings.run(again)
    assert again.progress.begun == [("sft", resumed, 4)]
    assert not changed(weights(whole.student), weights(again.student))
    (printed,) = [m for record in caplog.records if "damaged" in (m := record.getMessage())]
    assert FILE in printed and ("before it" if resumed else "anew") in printed


def test_experts_learn_from_the_answers_alone(tmp_path: Path) -> None:
    settings = config(tmp_path, max_steps=2)
    by_hand = job(tmp_path / "hand", tokenizer=byte_tokenizer(chat=CHAT), family="mixtral")
    expected = sft_by_hand(by_hand, settings, 2)
    result = settings.run(job(tmp_path / "run", tokenizer=byte_tokenizer(chat=CHAT), family="mixtral"))
    assert [loss for _, loss in result.losses] == pytest.approx(expected, rel=1e-4)


def test_the_callers_random_numbers_continue_as_before(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5))
    config(tmp_path, max_steps=1).run(job(tmp_path / "run", tokenizer=byte_tokenizer(chat=CHAT)))
    assert torch.equal(torch.rand(3), expected)


def test_adapters_kept_beside_the_weights_are_merged_when_the_weights_move(tmp_path: Path) -> None:
    for train, kept in (("mixers", True), ("all", False)):
        work = job(tmp_path / train, tokenizer=byte_tokenizer(chat=CHAT))
        work.student.adapter_state = AdapterState(kept=object())  # type: ignore[arg-type]
        config(tmp_path, train=train, max_steps=1).run(work)
        assert (work.student.adapter_state.kept is not None) is kept


def test_a_loss_that_is_not_finite_keeps_nothing_as_final(tmp_path: Path) -> None:
    work = job(tmp_path / "run", tokenizer=byte_tokenizer(chat=CHAT))
    next(iter(work.student.mixer_parameters().values())).data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"the loss at step 1 of stage 'sft'.* is nan: lower lr"):
        config(tmp_path).run(work)
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


ANSWERS = {
    "messages": (TALK, "two\nfour\n</s>"),
    "completion": ({"prompt": "Q: ", "completion": "two"}, "two</s>"),
    "alpaca": ({"instruction": "Add", "input": "1 2", "output": "3"}, "3</s>"),
    "text": ({"text": "plain"}, "<s>plain</s>"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_answers_alone_count(tmp_path: Path, name: str) -> None:
    row, expected = ANSWERS[name]
    documents = config(tmp_path, [row]).rows(byte_tokenizer(chat=CHAT), None)
    assert counted(documents[0]) == expected


def test_the_template_that_was_trained_with_goes_with_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}", encoding="utf-8")
    settings = config(tmp_path, [TALK], chat_template=str(tmp_path / "own.jinja"), max_steps=1)
    work = job(tmp_path / "run")
    assert settings.rows(work.tokenizer, None)[0].tokens[1:6] == byte_tokenizer()("[one]")["input_ids"]
    settings.run(work)
    assert work.tokenizer.chat_template == (tmp_path / "own.jinja").read_text("utf-8")


def test_bad_data_is_reported_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = [{"prompt": "a" * 9, "completion": "b"}]
    for number, (options, reason) in enumerate(
        (
            ({}, "row 1: has messages, but the tokenizer has no chat template"),
            ({"chat_template": "plane"}, "unknown chat_template 'plane': did you mean 'plain'"),
            ({"chat_template": "{% for %}"}, "row 1: the chat template refuses these messages"),
            ({"rows": long, "length": 9}, "no answer is left in 9 tokens a row"),
        )
    ):
        settings = config(tmp_path / str(number), **options)
        with pytest.raises(InputError, match=reason) as caught:
            settings.check_data(byte_tokenizer())
        assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="linearize"):
        rows = [{"prompt": "a" * size, "completion": "bc"} for size in (4, 12)]
        assert len(config(tmp_path, rows, length=9).rows(byte_tokenizer(), 20)) == 1
    assert "1 of 2 rows have no answer within 9 tokens" in caplog.text


def test_the_shortest_of_epochs_steps_and_tokens_decides(tmp_path: Path) -> None:
    assert count_steps(config(tmp_path, epochs=3), 10, 1000) == 8
    assert count_steps(config(tmp_path, epochs=0.5), 10, 1000) == 2
    assert count_steps(config(tmp_path, epochs=3, max_steps=5), 10, 1000) == 5
    assert count_steps(config(tmp_path, epochs=3, max_steps=5, tokens="1300"), 10, 1000) == 4
    order = row_order(5, 13, seed=1)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and order[:5] != order[5:10]
    work = job(tmp_path / "run", tokenizer=byte_tokenizer(chat=CHAT))
    before = weights(work.student)
    assert config(tmp_path, tokens=0).run(work).steps == 0 and not changed(before, weights(work.student))


def test_losses_and_log_probabilities_are_those_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    model = tiny("llama").requires_grad_(True)
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=generator)
    labels = ids.masked_fill(torch.rand(3, 7, generator=generator) < 0.6, -100)
    labels[:, 4] = -100  # a column without a label
    batch = {"input_ids": ids, "position_ids": torch.arange(7).repeat(3, 1), "labels": labels}
    mask = labels[:, 1:] != -100
    assert 0 < int(mask.sum()) < mask.numel()
    logits = model(ids).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask
    weights = torch.tensor([0.3, -1.1, 2.0])
    expected = torch.autograd.grad((picked.sum(1) * weights).sum(), list(model.parameters()))
    monkeypatch.setattr("linearize.training.stages.chunked_logits.SLICE_NUMBERS", 2 * VOCABULARY)  # two tokens a slice
    split = SplitModel(model)
    log_probs = answer_log_probs(split, batch)
    torch.testing.assert_close(log_probs, picked.sum(1))
    measured = torch.autograd.grad((log_probs * weights).sum(), list(model.parameters()))
    torch.testing.assert_close(measured, expected)
    loss = answer_loss(split, batch)
    torch.testing.assert_close(loss.sum, -picked.sum())
    assert loss.count == int(mask.sum())
    assert loss.also["mean_token_accuracy"] == int(((logits.argmax(-1) == ids[:, 1:]) & mask).sum())


def test_the_stages_are_in_the_table() -> None:
    assert STAGES["sft"] is SftConfig and STAGES["dpo"].model_fields["beta"].default == 0.1
