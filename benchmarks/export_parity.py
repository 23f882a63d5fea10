"""Exported students compared with the students themselves: differences of logits where linearize cannot be imported.

Nothing is trained: each student's mixers are drawn at random, so that no part of them stays at a start that hides it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.timing import SEED, parser, publish
from linearize.mixers import MIXERS, MixerConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.cache_argument import cache_of, with_cache
from linearize.modeling.export import EXPORTS, export_student
from linearize.modeling.export.common import Source
from linearize.modeling.io.teacher import load_teacher

TARGET = "logits within 1e-4 in fp32, prefill and decode, in a process where `import linearize` fails"
FIRST_TOKEN = 3  # the ids below are special in most vocabularies
RANDOM_BODY = {
    "vocab_size": 67, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 8, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 12, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
RANDOM_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "qwen2": {"head_dim": 6},
    "qwen3": {},
}
OUTSIDE = """
import json, sys
sys.modules["linearize"] = None
try:
    import linearize
    raise SystemExit("linearize can be imported")
except ImportError:
    pass
import torch, transformers
from safetensors.torch import load_file
root, count, prompt, new, threads = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
found = []
for folder in (f"{root}/{number}" for number in range(count)):
    given = load_file(folder + "/expected.safetensors")
    ids, expected = given["ids"], given["logits"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder + "/model", trust_remote_code=True)
    with torch.no_grad():
        prefill = model(ids, use_cache=False).logits
        out = model(ids[:, :prompt], use_cache=True)
        name = "cache" if "cache" in out else "past_key_values"
        steps = [out.logits]
        for t in range(prompt, ids.shape[1]):
            out = model(ids[:, t : t + 1], use_cache=True, **{name: out[name]})
            steps.append(out.logits)
    written = model.generate(ids[:, :prompt], max_new_tokens=new, do_sample=False)
    found.append({
        "class": type(model).__name__,
        "prefill": float((prefill - expected).abs().max()),
        "decode": float((torch.cat(steps, 1) - expected).abs().max()),
        "greedy_equal": torch.equal(written, given["written"]),
    })
print(json.dumps(found))
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A student to export: `plan` has a mixer's name or None (softmax) for each layer."""

    teacher_name: str
    teacher: PreTrainedModel
    plan: list[str | None]


def cases(paths: Sequence[str], families: Sequence[str]) -> Iterator[Case]:
    """Students of these teachers, and of tiny random ones of these families."""
    teachers = [(path, load_teacher(path)[0]) for path in paths]
    teachers += [(f"random {family}", random_teacher(family)) for family in families]
    for name, teacher in teachers:
        layers = teacher.config.get_text_config().num_hidden_layers
        mixers = ["gated_delta_net"] if teacher.config.model_type == "qwen3" else ["mamba2", "gated_delta_net"]
        for mixer in mixers:
            yield Case(teacher_name=name, teacher=teacher, plan=[None if i % 2 else mixer for i in range(layers)])
        every = [*MIXERS, None]
        yield Case(teacher_name=name, teacher=teacher, plan=[every[i % len(every)] for i in range(layers)])


def random_teacher(family: str) -> PreTrainedModel:
    """A tiny model of a family; every parameter is random, norms and biases too."""
    config = AutoConfig.for_model(family, **RANDOM_BODY | RANDOM_FAMILIES[family])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _draw(dict(model.named_parameters()), start_again=True)
    return model.eval()


def student_of(case: Case) -> LinearizedForCausalLM:
    """The student with its mixers away from their start."""
    plan: list[MixerConfig | None] = [None if name is None else MIXERS[name]() for name in case.plan]
    student = LinearizedForCausalLM.from_teacher(case.teacher, plan)
    _draw(student.mixer_parameters(), start_again=False)
    return student.eval()


@torch.no_grad()
def _draw(parameters: dict[str, nn.Parameter], *, start_again: bool) -> None:
    """Random parameters: new or perturbed matrices, perturbed vectors."""
    generator = torch.Generator().manual_seed(SEED)
    for parameter in parameters.values():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.add_(0.3 * noise)
        elif start_again:
            parameter.copy_(1.3 * noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.5 * noise / parameter.shape[-1] ** 0.5)


def measure(cases: Sequence[Case], *, tokens: int, prompt: int, new: int, threads: int) -> list[dict[str, Any]]:
    """Each student exported to the first target that takes it, and the result of a process without linearize."""
    with tempfile.TemporaryDirectory() as root:
        size = {"tokens": tokens, "prompt": prompt, "new": new}
        exported = [_export(case, Path(root) / str(number), **size) for number, case in enumerate(cases)]
        actual = _outside(root, len(exported), prompt, new, threads)
    return [row | result for row, result in zip(exported, actual, strict=True)]


def _export(case: Case, folder: Path, *, tokens: int, prompt: int, new: int) -> dict[str, Any]:
    """Write the student's export and the expected results; return the row."""
    student: Any = student_of(case)
    source = Source.of(student)
    to = next(name for name, export in EXPORTS.items() if export.misfit(source) is None)
    vocabulary = case.teacher.config.get_text_config().vocab_size
    ids = torch.randint(FIRST_TOKEN, vocabulary, (2, tokens), generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        logits: Tensor = student(ids, use_cache=False).logits
    written = student.generate(ids[:, :prompt], max_new_tokens=new, do_sample=False)
    folder.mkdir()
    export_student(student, to, folder / "model")
    save_file({"ids": ids, "logits": logits, "written": written}, folder / "expected.safetensors")
    results = {"largest_logit": float(logits.abs().max()), "own_decode": _own_decode(student, ids, prompt, logits)}
    return {"teacher": case.teacher_name, "mixers": case.plan, "target": to, **results}


@torch.no_grad()
def _own_decode(student: Any, ids: Tensor, prompt: int, logits: Tensor) -> float:
    """The difference between the student's own decode and prefill: the effect of rounding on these weights."""
    out = student(ids[:, :prompt], use_cache=True)
    steps = [out.logits]
    for token_B1 in ids[:, prompt:].split(1, dim=1):
        out = student(token_B1, use_cache=True, **with_cache(student, cache_of(out)))
        steps.append(out.logits)
    return float((torch.cat(steps, 1) - logits).abs().max())


def _outside(root: str, count: int, prompt: int, new: int, threads: int) -> list[dict[str, Any]]:
    """Run all exported models where linearize cannot be imported."""
    command = [sys.executable, "-c", OUTSIDE, root, *map(str, (count, prompt, new, threads))]
    environment = os.environ | {"HF_MODULES_CACHE": str(Path(root) / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"the exported model does not run: {done.stderr.strip()[-2000:]}")
    result: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    options = parser(__doc__)
    options.add_argument("--teacher", nargs="+", default=[], help="folders of teachers besides the random ones")
    options.add_argument("--random", nargs="*", default=list(RANDOM_FAMILIES), choices=list(RANDOM_FAMILIES))
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--prompt", type=int, default=5)
    options.add_argument("--new", type=int, default=16, help="tokens of greedy continuation")
    options.set_defaults(repeats=1)
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    size = {"tokens": chosen.tokens, "prompt": chosen.prompt, "new": chosen.new}
    rows = measure(list(cases(chosen.teacher, chosen.random)), **size, threads=chosen.threads)
    setting = {"dtype": "float32", "device": "cpu", "batch": 2, "transformers": version("transformers"), **size}
    publish(TARGET, setting, rows, chosen.out)


if __name__ == "__main__":
    main()
