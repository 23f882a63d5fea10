"""AlpacaEval (2404.04475): answers in its official format, and a judge that names the better of two outputs.

The judge answers with one letter, `m` or `M`; the official win rate weighs by that letter's probability instead, which
not every endpoint tells. The order of the two outputs is drawn for each instruction, as there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from linearize.evaluation.chat.answering import Ask
from linearize.evaluation.chat.answers import Answers, answer_all
from linearize.evaluation.chat.data import Instruction
from linearize.evaluation.chat.journal import Record, file_name
from linearize.evaluation.chat.judge import Judge, Message
from linearize.evaluation.context import EvalModel
from linearize.storage.atomic import atomic_write_text

NAME = "alpaca_eval"
JUDGE_TOKENS = 16  # one letter; some tokenizers and judges need a little room around it


def answer(
    eval_model: EvalModel,
    found: Sequence[Instruction],
    *,
    seed: int,
    temperature: float,
    max_new_tokens: int,
    batch: int,
    root: Path | None,
    progress: Callable[[int, int], None],
) -> Answers:
    """Answers to all instructions, also in `root/alpaca_eval/NAME/model_outputs.json` (whole at any time)."""
    asks = {i.text: Ask(turns=(i.text,), temperature=temperature, seed=f"{seed}/{NAME}/{i.text}") for i in found}
    datasets = {i.text: i.dataset for i in found}
    outputs: list[Record] = []

    def done(record: Record) -> None:
        text = record["question"]
        outputs.append(official_output(text, record["turns"][0]["text"], eval_model.name, datasets[text]))

    try:
        return answer_all(
            eval_model, asks, benchmark=NAME, max_new_tokens=max_new_tokens, batch=batch, root=root, done=done,
            progress=progress,
        )  # fmt: skip
    finally:
        write_list(root, (file_name(eval_model.name), "model_outputs.json"), outputs)


def official_output(instruction: str, output: str, generator: str, dataset: str) -> Record:
    """An entry of `model_outputs.json`."""
    return {"dataset": dataset, "instruction": instruction, "output": output, "generator": generator}


def write_list(root: Path | None, where: tuple[str, ...], records: Sequence[Record]) -> None:
    """A JSON list under `root/alpaca_eval`; nothing without a root."""
    if root is None:
        return
    path = root.joinpath(NAME, *where[:-1], where[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(list(records), indent=2, ensure_ascii=False) + "\n")


def baseline(found: Sequence[Instruction], teacher: Answers | None) -> tuple[str, dict[str, str]] | None:
    """What outputs are compared with: name and outputs. The file's own reference where it has one for all
    instructions, else the teacher's answers; None where there is neither."""
    generators = {i.generator for i in found}
    if len(generators) == 1 and None not in generators:
        return str(generators.pop()), {i.text: str(i.output) for i in found}
    if teacher is None:
        return None
    return teacher.eval_model, {r["question"]: r["turns"][0]["text"] for r in teacher.records}


def letter(reply: str) -> str | None:
    """`m` or `M` when the reply is that letter and nothing else but quotes, dots and space."""
    found = reply.strip(" \t\r\n\"'`.*")
    return found if found in ("m", "M") else None


def swapped(seed: int, instruction: str) -> bool:
    """Whether the baseline's output is shown second."""
    return hashlib.blake2b(f"{seed}/order/{instruction}".encode(), digest_size=1).digest()[0] % 2 == 1


def annotate(
    instruction: Instruction,
    pair: tuple[str, str],
    names: tuple[str, str],
    judge: Judge,
    prompt: Sequence[Message],
    seed: int,
) -> Record:
    """An entry of `annotations.json`. `pair`, `names`: outputs and names, the baseline's first.

    `preference`: 1 where the baseline is better, 2 where the model is, None unrated.
    """
    turned = swapped(seed, instruction.text)
    shown = pair[::-1] if turned else pair
    values = {"instruction": instruction.text, "output_1": shown[0], "output_2": shown[1]}
    messages = [{**message, "content": fill(message["content"], values)} for message in prompt]
    label = f"{NAME}/{names[0]}/{names[1]}"
    found, reply = judge.ask(label, messages, letter, max_tokens=JUDGE_TOKENS)
    preference = None if found is None else float(1 + ((found == "M") != turned))
    return {
        "instruction": instruction.text, "output_1": pair[0], "generator_1": names[0], "dataset": instruction.dataset,
        "output_2": pair[1], "generator_2": names[1], "annotator": judge.config.model, "preference": preference,
        "raw_completion": reply,
    }  # fmt: skip


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with each `{name}` replaced; its other braces stay (the official prompt shows JSON)."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)
