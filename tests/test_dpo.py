"""DPO: the published loss against the student as it was; killed and resumed without a trace."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import CHAT, byte_tokenizer
from dataset_stage_jobs import Killed, Watcher, changed, job, step_by_hand, weights
from pydantic import ValidationError
from torch import Tensor

from linearize.errors import InputError
from linearize.training.data.documents import Document
from linearize.training.data.preferences import preference_of
from linearize.training.dataset_stage import row_order
from linearize.training.stages.dpo import DpoConfig, frozen_copy

ROWS = [
    {"prompt": f"Q{i}" + "?" * (i % 3), "chosen": " yes" * (1 + i % 4), "rejected": " no, never"[: 4 + i % 5]}
    for i in range(7)
]


def config(folder: Path, rows: Any = ROWS, **settings: Any) -> DpoConfig:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    usual: dict[str, Any] = {"lr": 2e-3, "batch": 4, "epochs": 3, "evaluate_every": 2, "warmup": 2, "weight_decay": 0.1}
    return DpoConfig(data=str(folder / "rows.json"), **{**usual, **settings})


def log_probability(model: Any, document: Document) -> Tensor:
    """Of the answer's tokens, one row alone, no padding."""
    ids, mask = torch.tensor(document.tokens)[None], torch.tensor(document.loss_mask)[None, 1:]
    scores = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return (scores.gather(-1, ids[:, 1:, None])[..., 0] * mask).sum()


def dpo_by_hand(work: Any, settings: DpoConfig, steps: int) -> list[float]:
    """Margins of each step, equation 7 of the paper pair by pair; trains the job's student."""
    student = work.student
    names = student.mixer_parameters() if settings.train == "mixers" else dict(student.named_parameters())
    student.requires_grad_(False)
    reference = copy.deepcopy(student)
    for parameter in names.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(names.values(), betas=settings.betas, weight_decay=settings.weight_decay)
    pairs, margins = settings.rows(work.tokenizer, work.context), []
    order = row_order(len(pairs), steps * settings.batch, work.seed + settings.seed)
    for step in range(steps):
        results = []
        for row in order[step * settings.batch : (step + 1) * settings.batch]:
            chosen, rejected = pairs[row].chosen, pairs[row].rejected
            gain = log_probability(student, chosen) - log_probability(student, rejected)
            with torch.no_grad():
                was = log_probability(reference, chosen) - log_probability(reference, rejected)
            results.append(settings.beta * (gain - was))
        torch.stack([-torch.nn.functional.logsigmoid(margin) for margin in results]).mean().backward()
        margins.append(float(torch.stack(results).mean().detach()))
        step_by_hand(list(names.values()), optimizer, settings, step, steps)
    return margins


@pytest.mark.parametrize(("family", "train"), [("llama", "all"), ("llama", "mixers"), ("mixtral", "mixers")])
def test_each_step_is_the_published_one(tmp_path: Path, family: str, train: str) -> None:
    settings = config(tmp_path, train=train, micro_batch=3, max_steps=4, beta=0.3)
    expected_job = job(tmp_path / "hand", family=family)
    expected = dpo_by_hand(expected_job, settings, 4)
    work = job(tmp_path / "run", family=family)
    before = weights(work.student)
    result = settings.run(work)
    assert result.steps == 4 and result.losses[0][1] == pytest.approx(0.693147, abs=1e-5)
    assert [margin for _, margin in result.metrics["rewards/margins"]] == pytest.approx(expected, rel=2e-3, abs=2e-5)
    assert max(map(abs, expected)) > 0.01  # or the line above would say nothing
    after, target = weights(work.student), weights(expected_job.student)
    assert max(float((after[name] - target[name]).abs().max()) for name in after) < 4e-4
    moved = changed(before, after)
    assert moved and (train == "all" or all(".mixer." in name for name in moved))
    assert sum(work.student.get_parameter(name).numel() for name in moved) == result.trainable_parameters


def test_the_margin_grows_and_nothing_else_is_left_behind(tmp_path: Path) -> None:
    work = job(tmp_path / "run")
    teacher, tokens = weights(work.teacher), dict(vars(work.student.config))
    result = config(tmp_path).run(work)
    margins = [margin for _, margin in result.metrics["rewards/margins"]]
    assert result.steps == 6 == len(margins) and margins[-1] > margins[1] > margins[0] == 0
    assert not changed(teacher, weights(work.teacher))
    assert vars(work.student.config) == tokens and work.tokenizer.pad_token is None
    assert "forward" not in vars(work.student) and not work.student.training
    assert not any(p.requires_grad for p in work.student.parameters())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint.safetensors"]


def test_killed_and_resumed_is_bit_equal_to_unbroken(tmp_path: Path) -> None:
    settings = config(tmp_path)
    whole = job(tmp_path / "whole")
    expected = settings.run(whole)
    for kill_at, from_step in ((1, 0), (4, 2)):
        folder = tmp_path / f"killed-{kill_at}"
        torch.manual_seed(kill_at)
        with pytest.raises(Killed):
            settings.run(job(folder, progress=Watcher(kill_at)))
        watcher = Watcher()
        again = job(folder, progress=watcher)
        result = settings.run(again)
        assert watcher.begun == [("dpo", from_step, 6)]
        assert not changed(weights(whole.student), weights(again.student))
        assert result.losses == expected.losses and result.metrics == expected.metrics
        assert result.tokens == expected.tokens


def test_a_finished_stage_is_not_run_again_and_another_runs_folder_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path, max_steps=2)
    first = job(tmp_path / "run", before="nothing")
    expected = settings.run(first)
    watcher = Watcher()
    second = job(tmp_path / "run", progress=watcher, before="nothing")
    assert settings.run(second) == expected and not watcher.begun
    assert not changed(weights(first.student), weights(second.student))
    with pytest.raises(InputError, match=r"before was nothing, is distill"):
        settings.run(job(tmp_path / "run", before="distill"))
    with pytest.raises(InputError, match=r"stage\.beta was 0\.1, is 0\.01"):
        settings.model_copy(update={"beta": 0.01}).run(job(tmp_path / "run", before="nothing"))


def test_the_reference_shares_what_is_frozen_and_owns_what_moves(tmp_path: Path) -> None:
    student = job(tmp_path).student
    trained = student.mixer_parameters()
    copied = frozen_copy(student, trained)
    mine, its = dict(student.named_parameters()), dict(copied.named_parameters())
    assert {name for name in mine if mine[name] is not its[name]} == set(trained)
    assert not changed(weights(student), weights(copied)) and not any(p.requires_grad for p in copied.parameters())


A, B = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
ASKED = {"role": "user", "content": "Is it?"}
CHATS = {
    "prompt text, answers as lists": {"prompt": "Is it?", "chosen": [A], "rejected": [B]},
    "prompt list, answers as text": {"prompt": [ASKED], "chosen": "yes", "rejected": "no"},
    "prompt repeated in the answers": {"prompt": "Is it?", "chosen": [ASKED, A], "rejected": [ASKED, B]},
    "no prompt": {"chosen": [ASKED, A], "rejected": [ASKED, B]},
    "messages": {"messages": [ASKED], "chosen": A, "rejected": B},
    "conversations": {
        "conversations": [{"from": "human", "value": "Is it?"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
}


@pytest.mark.parametrize("name", CHATS)
def test_all_ways_to_write_a_chat_mean_the_same(name: str) -> None:
    result = preference_of(CHATS[name], byte_tokenizer(chat=CHAT))
    assert result.chosen == "<user> Is it?\n<assistant> yes\n" and result.chosen[result.chosen_start :] == "yes\n"
    assert result.rejected == "<user> Is it?\n<assistant> no\n" and result.rejected[result.rejected_start :] == "no\n"


def test_plain_texts_are_joined_and_the_answers_alone_count(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    pairs = config(tmp_path, [{"prompt": "ab", "chosen": "cde", "rejected": "c"}]).rows(tokenizer, None)
    assert tokenizer.decode(pairs[0].chosen.tokens) == "<s>abcde</s>" and pairs[0].chosen.loss_mask == [0] * 3 + [1] * 4
    assert (
        tokenizer.decode(pairs[0].rejected.tokens) == "<s>abc</s>" and pairs[0].rejected.loss_mask == [0] * 3 + [1] * 2
    )


def test_the_plain_template_is_used_when_asked_for(tmp_path: Path) -> None:
    row, tokenizer = {"chosen": [ASKED, A], "rejected": [ASKED, B]}, byte_tokenizer()
    pair = config(tmp_path, [row], chat_template="plain").rows(tokenizer, None)[0]
    assert tokenizer.decode(pair.chosen.tokens) == "<s>User: Is it?\nAssistant: yes</s>"
    assert tokenizer.chat_template is None
    with pytest.raises(InputError, match=r"row 1: has messages, but the tokenizer has no chat template.*chat_template"):
        config(tmp_path, [row]).rows(tokenizer, None)


BAD = {
    "has no 'rejected' answer": {"prompt": "a", "chosen": "b"},
    "has no 'chosen' answer": {"prompt": "a", "chosen": "", "rejected": "b"},
    "its 'rejected' answer is empty": {"prompt": "a", "chosen": "b", "rejected": " "},
    "its 'chosen' answer is empty": {"prompt": [ASKED], "chosen": [{**A, "content": " "}], "rejected": [B]},
    "has no prompt": {"chosen": "b", "rejected": "c"},
    "must begin and end with the assistant's answer": {"prompt": "a", "chosen": [ASKED], "rejected": [B]},
    "a message from 'judge'": {"prompt": "a", "chosen": {"from": "judge", "value": "b"}, "rejected": [B]},
    "without content": {"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": [B]},
    "is a str": "text",
}


@pytest.mark.parametrize("reason", BAD)
def test_a_row_that_cannot_be_used_is_named_in_one_line(tmp_path: Path, reason: str) -> None:
    settings = config(tmp_path, [ROWS[0], BAD[reason]])
    with pytest.raises(InputError, match=reason) as caught:
        settings.check_data(byte_tokenizer(chat=CHAT))
    assert "row 2" in str(caught.value) and "\n" not in str(caught.value)


def test_long_rows_lose_their_end_and_useless_ones_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "abc", "chosen": "defghij", "rejected": "d"},
        {"prompt": "a" * 20, "chosen": "b", "rejected": "c"},  # the prompt fills the row
        {"prompt": "a", "chosen": "same", "rejected": "same"},
        {"prompt": "abc", "chosen": "defg1", "rejected": "defg2"},  # equal as far as they fit
    ]
    with caplog.at_level(logging.WARNING, logger="linearize"):
        pairs = config(tmp_path, rows, length=8).rows(byte_tokenizer(), 96)
    assert len(pairs) == 1 and byte_tokenizer().decode(pairs[0].chosen.tokens) == "<s>abcdefg"
    assert "3 of 4 preferences are left out: 1 have prompts of 8 or more tokens, 2 have equal" in caplog.text
    with pytest.raises(InputError, match="no preference is left"):
        config(tmp_path, rows[1:], length=8).rows(byte_tokenizer(), 96)
    with pytest.raises(InputError, match="length 97 is beyond the teacher's context 96"):
        config(tmp_path, rows, length=97).check_data(byte_tokenizer(), 96)


def test_settings_that_need_heldout_text_are_refused(tmp_path: Path) -> None:
    for options in ({"schedule": "plateau"}, {"keep_best": True}, {"patience": 3}):
        with pytest.raises(ValidationError, match="needs a held-out loss"):
            config(tmp_path, **options)


def test_the_shared_preferences_can_be_read(shared_dir: Path) -> None:
    spec = str(shared_dir / "data/preferences/dpo_en_demo.json")
    settings = DpoConfig(data=spec, length=20000, chat_template="plain")
    assert len(settings.rows(byte_tokenizer(), None)) == 299
