"""A judge on this machine, and a folder of questions: what the tests of the chat section share."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from byte_tokenizer import CHAT, SIZE, byte_tokenizer
from models import mixer, student_of, tiny

from linearize.evaluation.context import EvalContext, EvalModel
from linearize.modeling import LinearizedForCausalLM

Request = dict[str, Any]
Reply = str | tuple[int, str]  # text of a completion, or a status and a body
PROMPT_TOKENS, COMPLETION_TOKENS = 31, 7
WAIT_MS = 20  # before the next try of a request that failed


class StandIn(ThreadingHTTPServer):
    """Answers each request with `script(request, how many came before it)`."""

    def __init__(self, script: Callable[[Request, int], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.headers = script, [], []  # type: ignore[var-annotated]
        self.paths: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def prompts(self) -> list[str]:
        """What the user said in each request that came."""
        return [request["messages"][-1]["content"] for request in self.requests]


class Handler(BaseHTTPRequestHandler):
    server: StandIn

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(body)
            self.server.headers.append({name.lower(): value for name, value in self.headers.items()})
            self.server.paths.append(self.path)
        reply = self.server.script(body, number)
        status, text = (200, completion(reply)) if isinstance(reply, str) else reply
        self.send_response(status)
        if status in (301, 302, 307):
            self.send_header("Location", text)
        if status >= 400:
            self.send_header("Retry-After-Ms", str(WAIT_MS))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


def completion(text: str) -> str:
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS, "total_tokens": 38}
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage})


@contextmanager
def serving(script: Callable[[Request, int], Reply]) -> Iterator[StandIn]:
    server = StandIn(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 7, "category": "writing", "turns": ["Tell of a fox.", "Now in one word."]},
    {"question_id": 8, "category": "math", "turns": ["What is 2 + 5?", "And twice that?"]},
    {"question_id": 11, "category": "stem", "turns": ["Why is {ice} light?", "Say it \u2028 again."]},
]
REFERENCE = {"question_id": 8, "answer_id": "x", "model_id": "r", "choices": [{"index": 0, "turns": ["seven", "14"]}]}
SINGLE = {
    "": "Q:{question}|A:{answer}",
    "-multi-turn": "Q:{question_1}|A:{answer_1}|Q:{question_2}|A:{answer_2}",
}
PAIR = {
    "": "Q:{question}|A:{answer_a}|B:{answer_b}",
    "-multi-turn": "Q:{question_1}|{question_2}|A:{answer_a_1}|{answer_a_2}|B:{answer_b_1}|{answer_b_2}",
}
REFERENCES = {"": "|R:{ref_answer_1}", "-multi-turn": "|R:{ref_answer_1}|{ref_answer_2}"}
ALPACA = [
    {"instruction": "Name a colour.", "output": "red", "generator": "old", "dataset": "one"},
    {"instruction": "Name a {number}.", "output": "four", "generator": "old", "dataset": "two"},
    {"instruction": "Name a tree.", "output": "oak", "generator": "old", "dataset": "one"},
]
ALPACA_PROMPT = (
    '<|im_start|>system\nChoose.\n<|im_end|>\n<|im_start|>user\n{"i": "{instruction}", "m": "{output_1}", '
    '"M": "{output_2}"} {\n}\n<|im_end|>'
)


def data_root(folder: Path) -> Path:
    """MT-Bench's questions, prompts and references in the layout of the real ones."""
    chat = folder / "chat"
    (chat / "mt_bench" / "reference_answer").mkdir(parents=True)
    lines(chat / "mt_bench" / "question.jsonl", QUESTIONS)
    lines(chat / "mt_bench" / "reference_answer" / "gpt-4.jsonl", [REFERENCE])
    prompts = []
    for kind, plain, templates in (("single", "single-v1", SINGLE), ("pair", "pair-v2", PAIR)):
        for turn, template in templates.items():
            common = {"type": kind, "system_prompt": f"{kind} judge"}
            prompts.append({**common, "name": f"{plain}{turn}", "prompt_template": template})
            name = f"{kind}-math-v1{turn}"
            prompts.append({**common, "name": name, "prompt_template": template + REFERENCES[turn]})
    lines(chat / "judge_prompts.jsonl", prompts)
    return folder


def alpaca_root(folder: Path) -> Path:
    """AlpacaEval's instructions, reference outputs and prompt."""
    alpaca = folder / "chat" / "alpaca_eval"
    alpaca.mkdir(parents=True)
    (alpaca / "alpaca_eval.json").write_text(json.dumps(ALPACA), "utf-8")
    (alpaca / "prompt.txt").write_text(ALPACA_PROMPT, "utf-8")
    return folder


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def eval_models(chat: str | None = CHAT) -> tuple[EvalModel, EvalModel]:
    """A teacher and a student with random weights that write bytes."""
    sizes = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "max_position_embeddings": 512}
    teacher = tiny("llama", vocab_size=SIZE, **sizes)
    student: LinearizedForCausalLM = student_of(teacher, mixer())
    tokenizer = byte_tokenizer(chat=chat)
    return (
        EvalModel(name="teacher", role="teacher", path="t", model=teacher, tokenizer=tokenizer, fingerprint="1"),
        EvalModel(name="org/student", role="student", path="s", model=student, tokenizer=tokenizer, fingerprint="2"),
    )


def eval_context(root: Path, out: Path | None, models: tuple[EvalModel, ...], **changes: Any) -> EvalContext:
    return EvalContext(models=models, data_root=root, out=out, batch=2, **changes)
