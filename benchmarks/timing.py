"""What the benchmarks share: a random Llama of a given size, and one JSON file with provenance."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from linearize.metrics.report import provenance
from linearize.storage.atomic import atomic_write_text

SEED = 0


def random_llama(
    *, hidden: int, layers: int, heads: int, kv_heads: int, context: int, vocab: int, head_dim: int | None = None
) -> PreTrainedModel:
    """A Llama with random weights, fp32, MLP width 8/3 of the hidden size rounded up to 64, tied embeddings.

    `head_dim`: None is hidden / heads.
    """
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=-(-hidden * 8 // 3 // 64) * 64,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim or hidden // heads,
            max_position_embeddings=context,
            vocab_size=vocab,
            tie_word_embeddings=True,
        )
    ).eval()


def parser(what: str | None) -> argparse.ArgumentParser:
    """Options that all benchmarks have."""
    made = argparse.ArgumentParser(description=(what or "").splitlines()[0])
    made.add_argument("--out", type=Path, help="JSON file to write; the result is printed in any case")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads that torch uses")
    made.add_argument("--repeats", type=int, default=5)
    return made


def publish_each(asked: str, setting: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], out: Path | None) -> None:
    """`publish`, with what there is written to `out` after each row: who is stopped loses the row in flight alone."""
    measured = list[Mapping[str, Any]]()
    for row in rows:
        measured.append(row)
        publish(asked, setting, measured, out, whole=False)
    publish(asked, setting, measured, out)


def publish(
    asked: str,
    setting: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    out: Path | None,
    *,
    line: str | None = None,
    whole: bool = True,
) -> None:
    """Print the result, and write it to `out`: the target, the options, the rows, the provenance.

    `line`: the result in one line, which goes to stderr. `whole`: False where rows follow: it is written alone.
    """
    document = {"asked": asked, "setting": dict(setting), "rows": list(rows), "provenance": provenance(seed=SEED)}
    text = json.dumps(document, indent=2) + "\n"
    if whole:
        print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out, text)
    if line is not None:
        print(line, file=sys.stderr)
