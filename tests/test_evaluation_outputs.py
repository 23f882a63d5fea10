"""Recall, decode cost, report, card, plots and `evaluate`, on tiny random models."""

from __future__ import annotations

import json
import re
import string
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, StaticCache

from linearize.errors import InputError
from linearize.evaluation import (
    DecodeCost,
    LanguageModelingReport,
    StageReport,
    build_report,
    cache_bytes,
    decode_cost,
    provenance,
    read_report,
    recall_beyond_window,
    write_report,
)
from linearize.evaluation.recall import fact_distance, matches, plot_recall
from linearize.evaluation.speed.decode_cost import plot_decode_cost
from linearize.metrics.card import model_card
from linearize.metrics.language_model import PositionBin
from linearize.metrics.plots import (
    plot_layer_error,
    plot_loss_by_position,
    plot_stages,
)
from linearize.mixers.lolcats import LolcatsConfig
from linearize.modeling import LinearizedForCausalLM

CHARACTERS = [*string.ascii_letters, *string.digits, *" \n:.,?"]


def tiny_tokenizer(extra: str = "") -> PreTrainedTokenizerFast:
    """One token a character; no pad token."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *CHARACTERS, *extra])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_llama(seed: int, vocabulary: int = len(tiny_tokenizer())) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, head_dim=10, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return model.eval()


@dataclass(frozen=True)
class Item:
    prompt: str
    answer: str


ITEMS = [
    Item("The code is 4821. A cat sat. The code is ", "4821"),
    Item("The code is 93. It was a long and sunny day, and the dog ran home. The code is ", "93"),
    Item("The code is 7. The code is", "7"),
]


class ShortSighted:
    """A stand-in for a model: copies the first number among the last `reach` tokens of the prompt."""

    device = torch.device("cpu")

    def __init__(self, reach: int) -> None:
        self.reach, self.tokenizer = reach, tiny_tokenizer()

    def generate(
        self, *, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, do_sample: bool, pad_token_id: int
    ) -> Tensor:
        assert not do_sample and (attention_mask[:, -1] == 1).all()
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = self.tokenizer.decode(ids[mask.bool()])
            match = re.search(r"\d+", text[-self.reach :])
            answer = f" {match[0]}." if match else " zero"
            new = self.tokenizer(answer)["input_ids"][:max_new_tokens]
            rows.append(torch.cat([ids, torch.tensor(new + [pad_token_id] * (max_new_tokens - len(new)))]))
        return torch.stack(rows)


def test_recall_by_distance() -> None:
    tokenizer = tiny_tokenizer()
    distances = [
        len(". A cat sat. The code is"),
        len(ITEMS[1].prompt.rstrip()) - len("The code is 93"),
        len(". The code is"),
    ]
    assert [fact_distance(tokenizer, item) for item in ITEMS] == distances
    told_twice = Item("The code is 4821. A cat sat: 4821. The code is", "4821")
    assert fact_distance(tokenizer, told_twice) == len(". The code is")  # from the nearer mention
    for reach, right in ((1000, 3), (30, 2), (20, 1), (3, 0)):
        report = recall_beyond_window(
            ShortSighted(reach), tokenizer, ITEMS, batch_size=2, distance_edges=[0, 16, 40, 99]
        )
        assert [answer.correct for answer in report.answers] == [distance < reach for distance in distances]
        assert report.accuracy == pytest.approx(right / 3)
        assert [(b.start, b.end, b.items) for b in report.by_distance] == [(0, 16, 1), (16, 40, 1), (40, 99, 1)]
        assert [b.accuracy for b in report.by_distance] == [right >= 1, right >= 2, right >= 3]
    everything = recall_beyond_window(ShortSighted(1000), tokenizer, ITEMS)
    assert sum(b.items for b in everything.by_distance) == 3
    json.dumps(everything.to_dict())


def test_recall_is_the_same_in_any_batch() -> None:
    model, tokenizer = tiny_llama(3), tiny_tokenizer()
    together = recall_beyond_window(model, tokenizer, ITEMS, batch_size=3)
    alone = [recall_beyond_window(model, tokenizer, [item]).answers[0].answer for item in ITEMS]
    shortest = [min(len(a), len(b.answer)) for a, b in zip(alone, together.answers, strict=True)]
    assert min(shortest) > 0
    for n, one, other in zip(shortest, alone, together.answers, strict=True):
        assert one[:n] == other.answer[:n]


def test_recall_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(InputError, match="no items"):
        recall_beyond_window(tiny_llama(3), tiny_tokenizer(), [])
    with pytest.raises(InputError, match="'55' is nowhere"):
        recall_beyond_window(tiny_llama(3), tiny_tokenizer(), [Item("The code is ", "55")])
    assert matches(" 48. And", "48") and matches("48", "48 ")
    assert not matches("481", "48") and not matches("4 8", "48")


@dataclass
class Inner:
    state: Tensor
    more: tuple[Any, ...]


def test_cache_bytes_finds_every_storage_once() -> None:
    big = torch.zeros(100, 7)
    layer = SimpleNamespace(
        keys=big[:3], again=big, state=Inner(torch.zeros(5), ([torch.zeros(2)], {"a": torch.zeros(3)}))
    )
    assert cache_bytes(SimpleNamespace(layers=[layer, SimpleNamespace(size=3, state=None)])) == 4 * (700 + 5 + 2 + 3)
    model = tiny_llama(1)
    cache = StaticCache(config=model.config, max_cache_len=29)
    model(torch.arange(11)[None], past_key_values=cache)
    assert cache_bytes(cache) == 3 * (2 * 3 * 29 * 10 * 4 + 8)  # and one int64 counter a layer
    dynamic = model(torch.arange(11)[None], past_key_values=DynamicCache(config=model.config)).past_key_values
    assert cache_bytes(dynamic) == 3 * 2 * 3 * 11 * 10 * 4


def test_decode_cost_feeds_the_whole_context() -> None:
    student, teacher = tiny_llama(1).train(), tiny_llama(2)
    seen: list[tuple[int, int]] = []
    student.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(
            (kwargs["input_ids"].shape[1], out.past_key_values.get_seq_length())
        ),
        with_kwargs=True,
    )
    costs = decode_cost(student, teacher, contexts=[70, 13], batch=2, repeats=3, tokens=2, warmup=1, chunk=32)
    assert [(cost.model, cost.context) for cost in costs] == [
        ("teacher", 13), ("student", 13), ("teacher", 70), ("student", 70),
    ]  # fmt: skip
    assert seen == [step for context in (13, 70) for step in _steps(context, 2, 1 + 3, 32)]
    assert student.training
    assert costs[2].cache_bytes == 3 * (2 * 2 * 3 * (70 + 2) * 10 * 4 + 8)
    assert costs[3].cache_bytes == 3 * 2 * 2 * 3 * 70 * 10 * 4
    assert all(0 < c.ms_spread[0] <= c.ms_per_token <= c.ms_spread[1] for c in costs)
    with pytest.raises(InputError, match="chunk is 0"):
        decode_cost(student, None, chunk=0)
    with pytest.raises(InputError, match="at least one"):
        decode_cost(student, None, contexts=[])


def _steps(context: int, tokens: int, runs: int, chunk: int) -> list[tuple[int, int]]:
    """Tokens of each forward and the cache's length after it: a prefill, and the same tokens after it in every run."""
    prefill = [(min(chunk, context - at), min(at + chunk, context)) for at in range(0, context, chunk)]
    return prefill + [(1, context + i + 1) for i in range(tokens)] * runs


def some_report(**changes: Any) -> Any:
    measured = LanguageModelingReport(
        tokens=4321, documents=7, teacher_loss=1.25, student_loss=1.31, student_kl=0.05, student_top1=0.91
    )
    stage = {"tokens": 1_000_000, "trainable_parameters": 4096, "seconds": 12.5}
    settings: dict[str, Any] = {
        "teacher": "models/some-teacher",
        "recipe": "window-linear",
        "data": ["a.txt", "b.jsonl"],
        "swap_loss": 2.5,
        "stages": [
            StageReport(name="attention_transfer", loss_before=2.5, loss_after=1.4, **stage),
            StageReport(name="lowrank", loss_before=1.4, loss_after=1.31, **stage),
        ],
        "held_out": measured,
        "layer_error": {"after the swap": [0.5, 0.4, 0.2], "after attention_transfer": [0.1, 0.1, 0.05]},
        "provenance": provenance("linearize convert 'a b'", seed=3),
    }
    return build_report(**(settings | changes))


def test_report_holds_what_is_pinned_and_comes_back(tmp_path: Path) -> None:
    report = some_report()
    written = json.loads(write_report(report, tmp_path).read_text())
    assert written["teacher_loss"] == 1.25 and written["swap_loss"] == 2.5 and written["student_loss"] == 1.31
    assert written["student_kl"] == 0.05 and written["student_top1"] == 0.91
    keys = {"name", "loss_before", "loss_after", "tokens", "trainable_parameters", "seconds"}
    assert all(keys <= stage.keys() for stage in written["stages"])
    provenance = written["provenance"]
    assert provenance["command"] == "linearize convert 'a b'" and provenance["seed"] == 3
    assert provenance["libraries"]["torch"] == torch.__version__ and provenance["hardware"]["cores"] >= 1
    assert provenance.keys() >= {"package_version", "commit", "date"}
    assert read_report(tmp_path) == report
    assert read_report(tmp_path / "nowhere") is None
    (tmp_path / "report.json").write_text(json.dumps(written | {"teacher_loss": "low"}))
    with pytest.raises(InputError, match="teacher_loss"):
        read_report(tmp_path)
    with pytest.raises(ValueError, match="same tokens"):
        some_report(held_out=LanguageModelingReport(tokens=3, documents=1, student_loss=1.0))


def test_command_line_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/some/where/linearize", "generate", "a folder"])
    assert provenance()["command"] == "linearize generate 'a folder'"


def test_model_card() -> None:
    config = {"model_type": "linearized", "teacher": {"model_type": "llama"}}
    card = model_card(some_report(), "name: window-linear\nplan: {}\n", config)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "linearize" and front["base_model"] == "models/some-teacher"
    for expected in (
        "| teacher | 1.2500 |  |",
        "| after the swap, untrained | 2.5000 | +1.2500 |",
        "| after `lowrank` | 1.3100 | +0.0600 | 1,000,000 | 4,096 |",
        "2,000,000 tokens",
        "(family `llama`)",
        "linearize.load(",
        "AutoModelForCausalLM.from_pretrained(",
        "plan: {}",
        "## Limits",
        "0.0600 nats per token worse",
    ):
        assert expected in card, expected
    card = model_card(some_report(), "name: window-linear\nplan: {}\n", config, adapter_only=True)
    assert 'linearize.load("models/some-teacher", adapter="path/to/this/folder")' in card
    assert "AutoModelForCausalLM" not in card and "linearize export" not in card


@pytest.mark.slow
def test_plots(tmp_path: Path) -> None:
    bins = [
        PositionBin(start=0, end=1, tokens=3, teacher_loss=3.0, student_loss=3.0, window_loss=3.0),
        PositionBin(start=1, end=2, tokens=3, teacher_loss=2.0, student_loss=2.1, window_loss=2.4),
    ]
    alone = [
        PositionBin(start=0, end=1, tokens=3, teacher_loss=3.0),
        PositionBin(start=1, end=2, tokens=3, teacher_loss=2.0),
    ]
    cost = {"batch": 1, "ms_per_token": 2.0, "ms_spread": (1.0, 3.0), "cache_bytes": 1000}
    costs = [DecodeCost(model=m, context=c, **cost) for m in ("teacher", "student") for c in (100, 1000)]
    files = plot_stages(some_report(), tmp_path / "new")
    files += plot_stages(some_report(stages=[]), tmp_path / "no_stages", window_loss=1.4)
    files += plot_loss_by_position(bins, tmp_path) + plot_loss_by_position(alone, tmp_path / "alone")
    files += plot_decode_cost(costs, tmp_path) + plot_layer_error({"after the swap": [0.5, 0.4]}, tmp_path)
    files += plot_decode_cost(costs[:2], tmp_path / "teacher")
    recall = recall_beyond_window(ShortSighted(30), tiny_tokenizer(), ITEMS, distance_edges=[0, 16, 40, 99])
    files += plot_recall({"teacher": recall, "student": recall}, tmp_path)
    assert len(set(files)) == 16
    for path in files:
        head = path.read_bytes()[:200]
        assert head.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in head
    first = (tmp_path / "stages.svg") if (tmp_path / "stages.svg").exists() else (tmp_path / "new" / "stages.svg")
    before = first.read_bytes()
    plot_stages(some_report(), first.parent)
    assert first.read_bytes() == before  # the same plot is the same file


def test_a_converted_layer_decodes_in_constant_memory() -> None:
    mixer = LolcatsConfig(window=3, feature_dim=5, num_sinks=1)
    student = LinearizedForCausalLM.from_teacher(tiny_llama(1), [mixer] * 3)
    sizes = {c.context: c.cache_bytes for c in decode_cost(student, None, contexts=[21, 84], repeats=1, chunk=17)}
    assert sizes[21] == sizes[84] > 0
