"""A model's answers to chat questions: turn by turn, in batches of one temperature, kept as they come."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from itertools import groupby

import torch
from transformers import PreTrainedTokenizerBase

from linearize.decoding.loading import pad_token
from linearize.evaluation.context import EvalContext, EvalModel
from linearize.evaluation.numbers import NumbersModel, ResultCache
from linearize.evaluation.sections.chat.data import Question
from linearize.training.data.chat import render, with_template
from linearize.training.data.pseudo_labels import left_padded
from linearize.training.data.sampling import cuda_devices, end_tokens, generation_config, write

PLAIN_STOP = "\nUser:"  # where a model without a template of its own goes on to write the user's part


class Turn(NumbersModel):
    """One answer. `tokens` written; `ended`: not cut off at the limit; `cut`: tokens at the beginning of the prompt
    that did not fit into the context."""

    text: str
    tokens: int
    ended: bool
    cut: int


Answers = dict[int | str, list[Turn]]
"""By question, the answers to its turns."""


def answer_all(
    ctx: EvalContext, eval_model: EvalModel, questions: Sequence[Question], max_new_tokens: int, results: ResultCache
) -> Answers:
    """Answers in the order of the questions, `ctx.batch` at a time; those among the results are not written again."""
    answers: Answers = {}
    by_temperature = groupby(sorted(questions, key=lambda q: q.temperature), key=lambda q: q.temperature)
    same = [list(group) for _, group in by_temperature]
    batches = [group[at : at + ctx.batch] for group in same for at in range(0, len(group), ctx.batch)]
    for done, batch in enumerate(batches, 1):
        key = {
            "section": "answers", "name": eval_model.name, "model": eval_model.fingerprint or eval_model.path,
            "chat_template": eval_model.tokenizer.chat_template, "seed": ctx.seed, "max_new_tokens": max_new_tokens,
            "questions": [[question.id, question.temperature, *question.turns] for question in batch],
        }  # fmt: skip
        kept = results.result(key, partial(converse, eval_model, batch, ctx.seed, max_new_tokens))
        answers |= {q.id: [Turn.model_validate(turn) for turn in turns] for q, turns in zip(batch, kept, strict=True)}
        ctx.progress(f"answers: {eval_model.name}", done, len(batches))
    return {question.id: answers[question.id] for question in questions}


@torch.inference_mode()
def converse(
    eval_model: EvalModel, questions: Sequence[Question], seed: int, max_new_tokens: int
) -> list[list[dict[str, object]]]:
    """The answers to all turns of questions of one temperature, side by side, as JSON.

    Draws depend on the seed, the questions and the turn alone. With a short context at most half of it is for the
    answer, and a prompt that does not fit loses its first tokens.
    """
    model, tokenizer = eval_model.model.eval(), eval_model.tokenizer
    context = eval_model.context or 2**31
    limit = max(1, min(max_new_tokens, context // 2))
    ends, pad = end_tokens(model, tokenizer), pad_token(tokenizer)
    config = generation_config(model, questions[0].temperature, limit, ends, pad)
    answers: list[list[Turn]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [(q.turns, own) for q, own in zip(questions, answers, strict=True) if turn < len(q.turns)]
        prompts = [prompt_tokens(tokenizer, turns, [t.text for t in own]) for turns, own in asked]
        inputs_BT, mask_BT = left_padded([tokens[-max(1, context - limit) :] for tokens in prompts], pad, model.device)
        draw = random.Random(f"{seed} {turn} {[question.id for question in questions]}")
        with torch.random.fork_rng(devices=cuda_devices(model)):
            torch.manual_seed(draw.getrandbits(63))
            rows = write(model, inputs_BT, mask_BT, config, ends)
        for (_, own), tokens, kept, row in zip(asked, prompts, mask_BT.sum(1).tolist(), rows, strict=True):
            ended = row[-1] in ends
            text = str(tokenizer.decode(row[: len(row) - ended], skip_special_tokens=True))
            if not tokenizer.chat_template and PLAIN_STOP in text:
                text, ended = text[: text.index(PLAIN_STOP)], True
            own.append(Turn(text=text.strip(), tokens=len(row), ended=ended, cut=len(tokens) - kept))
    return [[turn.to_json() for turn in own] for own in answers]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str], answers: Sequence[str]) -> list[int]:
    """The conversation up to the turn after the last answer. BOS is where an own template puts it, else first."""
    messages = [{"role": "user", "content": turns[0]}]
    for answer, turn in zip(answers, turns[1:], strict=False):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    template = None if tokenizer.chat_template else "plain"
    text = render(with_template(tokenizer, template), messages, add_generation_prompt=True)
    tokens = [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    bos = tokenizer.bos_token_id
    return [bos, *tokens] if isinstance(bos, int) and template else tokens
