"""`linearize verify`: whether an engine writes what the student writes, from an exported folder or (vLLM) its own.

The engine runs in a process of its own, by a Python that has it, and writes greedily after a few prompts. Its tokens
are then read by the student: each must be the student's first choice there, at the log-probability that the engine
gave. With prompts of a person's own, each text must also be the one that the student's `generate` writes, but for
places where two tokens are equally probable up to rounding, which are reported.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from linearize.errors import InputError, one_line, unknown
from linearize.modeling import load
from linearize.modeling.export.gguf import to_gguf
from linearize.modeling.io.hub import local_copy
from linearize.modeling.io.teacher import load_tokenizer
from linearize.phases import phase
from linearize.storage.files import expand_home

ENGINES = {"transformers": "transformers", "mlx": "mlx-lm", "vllm": "linearize[vllm]", "llama.cpp": "xllamacpp"}
"""And what pip calls it."""
RUNNERS = Path(__file__).parent / "engines"
PROMPTS = (
    "Once upon a time, there was a",
    "The train was late, and Anna had been waiting on the cold platform for an hour when",
    "Water boils at a lower temperature on a mountain because",
    "1. Wash the rice. 2. Put it into a pot. 3.",
    "def area(width, height):\n    return",
)
NOISE = re.compile(r"\s*For further information visit|\d+\.\d\d\.\d{3}\.\d{3} [DITW] ")
"""Lines after the reason: pydantic's last one, and what llama.cpp notes."""
STOPPED = ("GGML_ASSERT", "error loading model")  # of llama.cpp, which goes on to say other things
NEW = 30  # tokens written after each prompt: beyond the windows of most students
TIE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}  # nats between two tokens that rounding may swap
ROUNDING = TIE | {"float32": 1e-4}  # of texts, which part where rounding picks one of two tokens
TOLERANCE = {"float32": 0.01, "bfloat16": 0.2, "float16": 0.05}  # nats by which a log-probability may differ


class Parting(BaseModel):
    """Where an engine's text leaves that of `generate`. `prompt`, `place`: from 0. `gap`: nats, by the student, between
    the two tokens there; `rounding`: below which rounding decides."""

    prompt: int
    place: int
    engine_token: int
    generated_token: int
    gap: float
    rounding: float = ROUNDING["float32"]

    @property
    def is_tie(self) -> bool:
        """Whether rounding decides between the two."""
        return self.gap < self.rounding


class Verification(BaseModel):
    """`equal`: of `tokens`, those that are the student's first choice, or within rounding of it; `difference`: the
    largest of the log-probabilities, nats; `first`: the first unequal token, as (prompt, place) from 0. `same_texts`:
    texts that are those of `generate` (None: not compared); `partings`: where the others are not."""

    engine: str
    version: str
    folder: str
    prompts: int
    tokens: int
    equal: int
    difference: float
    allowed: float
    first: tuple[int, int] | None
    same_texts: int | None = None
    partings: list[Parting] = []

    @property
    def passed(self) -> bool:
        """Whether every token is equal, no log-probability differs by more than is allowed, and texts part at ties
        alone."""
        ties = all(parting.is_tie for parting in self.partings)
        return self.equal == self.tokens and self.difference <= self.allowed and ties


def verify(
    folder: str | Path,
    student: str | Path,
    engine: str,
    *,
    python: str | Path | None = None,
    new: int = NEW,
    prompts: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> Verification:
    """Compare an exported folder in an engine with the student that it was written from.

    Args:
        engine: one of `ENGINES`. python: an interpreter that has the engine (None: this one).
        new: tokens to write after each prompt.
        prompts: texts; with them the engine's texts are also compared with those of `generate`. None: five of ours.
        trust_remote_code: let the engine run the folder's own code.
        revision, token: of the student, where it is a Hub name.

    Raises:
        InputError: an unknown engine, one that is not installed, does not load the folder or gives no numbers, an empty
            list of prompts, or no student.
    """
    if prompts is not None and not prompts:
        raise InputError("prompts is empty: give texts, or None for five of ours")
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    folder, student = Path(expand_home(folder)), expand_home(student)
    fields = folder / "config.json"
    if not fields.is_file():
        raise InputError(f"{folder} has no config.json: give the folder that `linearize export` wrote")
    config = json.loads(fields.read_text("utf-8"))
    if ("auto_map" in config or "model_file" in config) and not trust_remote_code:
        raise InputError(f"{folder} carries code of its own, which {engine} would run: add --trust-remote-code")
    place = local_copy(student, revision=revision, token=token).path
    model: Any = load(place)
    dtype = str(model.dtype).removeprefix("torch.").replace("float64", "float32")  # no engine has fp64
    rows = _rows(place, model) if prompts is None else _own_rows(place, prompts, model, new)
    request = {"rows": rows, "new": new, "dtype": dtype, "remote_code": trust_remote_code}
    with phase(f"running {engine}"), tempfile.TemporaryDirectory() as temporary:
        model_file = folder
        if engine == "llama.cpp":
            to_gguf(folder, model_file := Path(temporary) / "model.gguf", dtype)
        answer = _run(engine, Path(python or sys.executable), folder, model_file, request)
    result = _compared(model, engine, str(folder), dtype, rows, answer)
    if prompts is None:
        return result
    partings = _partings(model, rows, answer, ROUNDING[dtype])
    return result.model_copy(update={"same_texts": len(rows) - len(partings), "partings": partings})


def _rows(student: str, model: Any) -> list[list[int]]:
    """Prompts as tokens; random ones where the student has no tokenizer."""
    try:
        tokenizer = load_tokenizer(student)
    except InputError:
        generator = torch.Generator().manual_seed(0)
        size = model.get_input_embeddings().weight.shape[0]
        return [torch.randint(size, (4 + 9 * i,), generator=generator).tolist() for i in range(len(PROMPTS))]
    rows = [list(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    return [row for row in rows if row]


def _own_rows(student: str, prompts: Sequence[str], model: Any, new: int) -> list[list[int]]:
    """A person's prompts as tokens. Raises InputError: no tokenizer, or a prompt that fills the context."""
    tokenizer = load_tokenizer(student)
    rows = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    longest, context = max(map(len, rows)), getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest + new > context:
        raise InputError(f"a prompt of {longest} tokens and {new} new ones exceed the context of {context}: shorten it")
    if not all(rows):
        raise InputError("a prompt is empty as tokens: leave it out")
    return rows


def _run(engine: str, python: Path, folder: Path, model_file: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What the engine wrote. `model_file`: what it reads, made from `folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        asked, answered = Path(temporary) / "request.json", Path(temporary) / "answer.json"
        asked.write_text(json.dumps(request), "utf-8")
        runner = RUNNERS / f"run_{engine.replace('.', '_')}.py"
        command = [str(python), str(runner), str(model_file), str(asked), str(answered)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise InputError(f"cannot run {python}: {one_line(error)}; give a Python that has {engine}") from error
        if done.returncode == 0 and answered.is_file():
            answer: dict[str, Any] = json.loads(answered.read_text("utf-8"))
            return answer
    lines = [line for line in done.stderr.splitlines() if line.strip() and not NOISE.match(line)]
    stopped = next((line for line in lines if any(word in line for word in STOPPED)), None)
    last = stopped or (lines[-1] if lines else f"exit code {done.returncode}")
    if "No module named" in last:
        raise InputError(
            f"{python} has no {engine} ({last.strip()}): pip install {ENGINES[engine]} there, or give another --python"
        )
    raise InputError(f"{engine} does not run {folder}: {last.strip()}")


@torch.no_grad()
def _compared(
    model: Any, engine: str, folder: str, dtype: str, rows: Sequence[Sequence[int]], answer: dict[str, Any]
) -> Verification:
    """Read what the engine wrote with the student, in one pass for each prompt."""
    tokens, equal, difference, first = 0, 0, 0.0, None
    for number, (row, written) in enumerate(zip(rows, answer["rows"], strict=True)):
        logprobs = written["logprobs"]
        if not written["tokens"] or not all(x is not None and math.isfinite(x) for x in logprobs):
            what = "log-probabilities that are no numbers" if written["tokens"] else "nothing"
            raise InputError(f"{engine} wrote {what} after prompt {number + 1}: it does not run {folder} rightly")
        ids = torch.tensor([[*row, *written["tokens"]]], device=model.device)
        scores = model(input_ids=ids, use_cache=False).logits[0, len(row) - 1 : -1].float().log_softmax(-1)
        own = scores.gather(-1, ids[0, len(row) :, None])[:, 0]
        right = (scores.amax(-1) - own <= TIE[dtype]).tolist()
        tokens, equal = tokens + len(right), equal + sum(right)
        difference = max(difference, float((own.cpu() - torch.tensor(logprobs)).abs().max()))
        if first is None and not all(right):
            first = (number, right.index(False))
    return Verification(
        engine=engine, version=str(answer["version"]), folder=folder, prompts=len(rows), tokens=tokens, equal=equal,
        difference=difference, allowed=TOLERANCE[dtype], first=first,
    )  # fmt: skip


@torch.no_grad()
def _partings(
    model: Any, rows: Sequence[Sequence[int]], answer: dict[str, Any], rounding: float = ROUNDING["float32"]
) -> list[Parting]:
    """Where the engine's texts leave those that the student's own `generate` writes."""
    partings = []
    with phase("comparing with generate"):
        for number, (row, written) in enumerate(zip(rows, answer["rows"], strict=True)):
            ids, tokens = torch.tensor([row], device=model.device), written["tokens"]
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(tokens), do_sample=False, num_beams=1,
                eos_token_id=-1, pad_token_id=0, repetition_penalty=1.0,
            )  # fmt: skip
            own = out[0, len(row) :].tolist()
            place = next((i for i, (a, b) in enumerate(zip(tokens, own, strict=True)) if a != b), None)
            if place is None:
                continue
            read = torch.tensor([[*row, *own[:place]]], device=model.device)
            scores = model(input_ids=read, use_cache=False).logits[0, -1].float().log_softmax(-1)
            gap = float((scores[own[place]] - scores[tokens[place]]).abs())
            partings.append(
                Parting(
                    prompt=number, place=place, engine_token=tokens[place], generated_token=own[place], gap=gap,
                    rounding=rounding,
                )
            )  # fmt: skip
    return partings
