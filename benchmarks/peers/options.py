"""The options and the text of every method. Needs torch and numpy alone, so that it runs in a peer's own environment.

Letters: R rows, T tokens.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SECTIONS = ("loss", "steps", "contexts")


@dataclass(frozen=True)
class Text:
    """Token ids of `benchmarks.peers.text`: `train` `[N]`, one long text, and `heldout` `[R, T]`, a document a row."""

    train_T: Tensor
    heldout_RT: Tensor
    digest: str

    @classmethod
    def load(cls, path: Path) -> Text:
        """Read the file. Raises ValueError for one without the two arrays."""
        try:
            with np.load(path) as arrays:
                train, heldout = arrays["train"], arrays["heldout"]
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"--text {path}: {error}: write it with python -m benchmarks.peers.text") from error
        digest = hashlib.sha256(train.tobytes() + heldout.tobytes()).hexdigest()[:16]
        return cls(torch.from_numpy(train).long(), torch.from_numpy(heldout).long(), digest)


def parser(what: str | None) -> argparse.ArgumentParser:
    """Options that all methods have."""
    made = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--teacher", type=Path, required=True, help="folder of a Llama")
    made.add_argument("--text", type=Path, required=True, help="tokens written by benchmarks.peers.text")
    made.add_argument("--out", type=Path, help="JSON file to write; the result is printed in any case")
    made.add_argument("--measure", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    made.add_argument("--layers", type=int, help="keep only the first layers of the teacher")
    made.add_argument("--step-lengths", type=int, nargs="+", default=[512, 1024])
    made.add_argument("--train-tokens", type=int, default=32768)
    made.add_argument("--train-length", type=int, default=512)
    made.add_argument("--heldout-rows", type=int, default=8)
    made.add_argument("--heldout-length", type=int, default=1024)
    made.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    made.add_argument("--new-tokens", type=int, default=16, help="tokens decoded after each context")
    made.add_argument("--repeats", type=int, default=1)
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--seed", type=int, default=0)
    return made


def window_options(made: argparse.ArgumentParser) -> None:
    """Options of attention with a window."""
    made.add_argument("--window", type=int, default=64)
    made.add_argument("--feature-dim", type=int, default=64)
    made.add_argument("--shape", choices=("terraced", "sliding"), default="terraced")
    made.add_argument("--exchange", type=Path, help="file with weights and outputs of the published attention")


def check(options: argparse.Namespace, text: Text) -> None:
    """Raise ValueError, in one line, for sizes that do not fit together."""
    for name in ("layers", "train_length", "heldout_rows", "heldout_length", "new_tokens", "repeats", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least 1")
    tokens, (rows, length) = len(text.train_T), text.heldout_RT.shape
    needs = {
        "loss": ("--train-tokens", options.train_tokens),
        "steps": ("--step-lengths", max(options.step_lengths)),
        "contexts": ("--contexts and --new-tokens", max(options.contexts) + options.new_tokens),
    }
    for name, need in (needs[section] for section in options.measure):
        if need > tokens:
            raise ValueError(f"{name}: {need} tokens needed, the text has {tokens}: lower it or write a longer text")
    if "loss" in options.measure and options.train_tokens < options.train_length:
        raise ValueError(f"--train-tokens {options.train_tokens}: give at least --train-length {options.train_length}")
    if options.heldout_rows > rows or options.heldout_length > length:
        raise ValueError(
            f"--heldout-rows {options.heldout_rows} of --heldout-length {options.heldout_length}: "
            f"the text has {rows} of {length}"
        )
    window = getattr(options, "window", None)
    if window is not None:
        lengths = {*options.step_lengths, *options.contexts, options.train_length, options.heldout_length}
        if wrong := sorted(n for n in lengths if n % window or n < 2 * window):
            raise ValueError(f"{wrong[0]} tokens: with --window {window} every length must be a multiple, at least two")
