"""The tokens that every method is measured on: one long training text, and the beginnings of other documents.

    python -m benchmarks.peers.text --teacher DIR --data novels.jsonl --out tokens.npz

The training text is the first documents, one after the other; held-out rows are the first tokens of the last
documents, which training never sees.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CHARACTERS = 16  # at most per token: enough text is cut before it is tokenised


def documents(path: Path) -> list[str]:
    """The texts of a JSONL file with a field `text`. Raises ValueError for another file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [str(json.loads(line)["text"]) for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--data {path}: {error!r}: give a JSONL file with a field text") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--teacher", required=True, help="folder with the tokenizer")
    made.add_argument("--data", type=Path, required=True)
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--train-tokens", type=int, default=65536)
    made.add_argument("--heldout-rows", type=int, default=16)
    made.add_argument("--heldout-length", type=int, default=2048)
    options = made.parse_args(arguments)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.teacher)

    def encode(text: str, count: int) -> list[int]:
        ids: list[int] = tokenizer(text[: CHARACTERS * count], add_special_tokens=False)["input_ids"]
        return ids[:count]

    try:
        texts = documents(options.data)
    except ValueError as error:
        made.error(str(error))
    rows = [encode(text, options.heldout_length) for text in texts[-options.heldout_rows :]]
    train: list[int] = []
    for text in texts[: -options.heldout_rows]:
        if len(train) < options.train_tokens:
            train += encode(text, options.train_tokens - len(train))
    if len(train) < options.train_tokens or min(map(len, rows), default=0) < options.heldout_length:
        made.error(f"--data {options.data}: too short for these sizes: lower --train-tokens or the held-out ones")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(options.out, train=np.array(train, np.int32), heldout=np.array(rows, np.int32))
    print(f"{options.out}: {len(train)} training tokens, {len(rows)} held-out rows of {options.heldout_length}")


if __name__ == "__main__":
    main()
