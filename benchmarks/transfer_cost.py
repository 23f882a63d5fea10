"""Time of an attention-transfer step against a forward and backward pass of the teacher that trains all its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.timing import SEED, parser, publish, random_llama
from linearize.evaluation.speed.running import interleaved
from linearize.mixers.lolcats import LolcatsConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.training.stages.attention_transfer import AttentionTransferConfig

MIXER: dict[str, Any] = {
    "window_shape": "terraced",
    "feature_map": "gain",
    "feature_dim": 32,
    "shift": "shared",
    "num_sinks": 1,
}


def measure(
    teacher: PreTrainedModel, *, rows: int, tokens: int, documents: int, window: int, repeats: int
) -> dict[str, Any]:
    """Seconds of both on the same batch (`documents` packed in a row), and their ratio."""
    batch = _batch(teacher, rows, tokens, documents)
    plan = [LolcatsConfig(window=window, **MIXER)] * teacher.config.num_hidden_layers
    student = LinearizedForCausalLM.from_teacher(_copy(teacher), plan)
    run = AttentionTransferConfig(tokens=1, lr=1e-2).build(student, teacher)
    runs = {"teacher": _teacher_step(teacher, batch), "transfer": _transfer_step(run, batch)}
    times = interleaved(runs, repeats)
    return {
        "rows": rows,
        "tokens": tokens,
        "documents": documents,
        "window": window,
        "parameters": sum(p.numel() for p in teacher.parameters()),
        "times": {name: vars(timing) for name, timing in times.items()},
        "ratio": times["transfer"].seconds / times["teacher"].seconds,
        "ratio_cpu": times["transfer"].cpu_seconds / times["teacher"].cpu_seconds,
    }


def _copy(teacher: PreTrainedModel) -> PreTrainedModel:
    """Weights of its own, as the stage freezes the student's."""
    copy = type(teacher)(teacher.config)
    copy.load_state_dict(teacher.state_dict())
    return copy.eval()


def _batch(model: PreTrainedModel, rows: int, tokens: int, documents: int) -> dict[str, Tensor]:
    ids = torch.randint(3, model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(SEED))
    position = torch.cat([torch.arange(len(part)) for part in torch.arange(tokens).tensor_split(documents)])
    return {"input_ids": ids, "position_ids": position.repeat(rows, 1), "labels": ids.clone()}


def _teacher_step(model: PreTrainedModel, batch: dict[str, Tensor]) -> Callable[[], Any]:
    def run() -> None:
        model(**batch, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def _transfer_step(stage: Any, batch: dict[str, Tensor]) -> Callable[[], Any]:
    def run() -> None:
        loss = stage.loss(batch)
        (loss.sum / loss.count).backward()
        stage.student.zero_grad(set_to_none=True)

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    options = parser(__doc__)
    options.add_argument("--teacher", type=Path, help="folder of a small teacher, timed on packed rows of 8 x 512")
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--layers", type=int, default=8)
    options.add_argument("--heads", type=int, default=8)
    options.add_argument("--kv-heads", type=int, default=8)
    options.add_argument("--vocab", type=int, default=8192)
    options.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048])
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    torch.set_flush_denormal(True)
    size = {name: getattr(chosen, name) for name in ("hidden", "layers", "heads", "kv_heads", "vocab")}
    teacher = random_llama(**size, context=max(chosen.tokens))
    rows = [
        {"teacher": "random"} | measure(teacher, rows=1, tokens=n, documents=1, window=64, repeats=chosen.repeats)
        for n in chosen.tokens
    ]
    if chosen.teacher is not None:
        small = AutoModelForCausalLM.from_pretrained(chosen.teacher).eval()
        row = measure(small, rows=8, tokens=512, documents=3, window=16, repeats=chosen.repeats)
        rows.append({"teacher": chosen.teacher.name} | row)
    setting = {"dtype": "float32", "model": size, "mixer": MIXER}
    publish("transfer at most 1.5 times the teacher's step", setting, rows, chosen.out)


if __name__ == "__main__":
    main()
