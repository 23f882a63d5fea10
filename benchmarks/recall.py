"""Recall of SmolLM2's students with an exact store and with retrieval heads, against the teacher and the window alone.

    python -m benchmarks.recall heads --teacher DIR
    python -m benchmarks.recall measure teacher window-linear+store128 --teacher DIR --text c.jsonl
    python -m benchmarks.recall decode teacher window-linear+store128 --teacher DIR --text c.jsonl
    python -m benchmarks.recall_page

A variant is a row of `benchmarks.smollm2` (`ROW-mixers`: without its LoRA), `+storeN` for N exact pairs of each
key/value head, and `+headsP` for P percent of the key/value groups with their softmax attention back (by rank,
`heads.json`); both are given to the trained student without further training. Greedy answers are counted; each cell
is kept as soon as it is measured (the same command continues), in `benchmarks/recall/VARIANT.json`. Losses are in
nats per token, times in seconds.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel
from transformers import StaticCache

from benchmarks.smollm2 import student_folder
from benchmarks.smollm2_measure import RECALL as FOLDER
from benchmarks.smollm2_measure import TEACHER, Losses, Variant, distances, first_rows
from linearize.decoding.loading import load_any
from linearize.evaluation.haystack import (
    PASS_KEY,
    Hay,
    HiddenFact,
    Ruler,
    multikey_question,
    multivalue_question,
    needle_question,
    passkey_question,
)
from linearize.evaluation.recall import answer_greedily
from linearize.evaluation.speed import cache_bytes
from linearize.metrics.head_scores import HeadScores, head_scores
from linearize.metrics.report import provenance
from linearize.metrics.token_scores import View
from linearize.modeling.cache_argument import with_cache
from linearize.storage.atomic import atomic_write_text
from linearize.training.data.loading import load_documents

TESTS = ("passkey", "needle", "multikey", "multivalue")
KEYS, VALUES, SEED, CONTEXT, TIMED, IN_TURN = 4, 2, 0, 4096, 128, 8
VARIANT = re.compile(r"(?P<row>[a-z0-9-]+?)(\+store(?P<store>\d+))?(\+heads(?P<heads>\d+))?")


class Heads(BaseModel):
    """The teacher's groups by rank, and what each is missed alone, nats."""

    places: list[tuple[int, int]]
    falls: list[float]
    answer: float
    provenance: dict[str, Any]


def build(name: str, teacher: str, dtype: str | None = None) -> tuple[Any, Any, int]:
    """The model of a variant, its tokenizer, and how many groups keep softmax. `dtype`: of the arithmetic (None: that
    of the teacher's files)."""
    model: Any
    if name == TEACHER:
        model, tokenizer = load_any(teacher)
        return _in(model, dtype), tokenizer, 0
    parts = VARIANT.fullmatch(name)
    if parts is None:
        raise SystemExit(f"{name}: give ROW, ROW+storeN, ROW+headsP or ROW+storeN+headsP")
    store = parts["store"] and int(parts["store"])
    model, tokenizer = load_any(teacher, adapter=str(student_folder(parts["row"])), store=store or None)
    count = sum(len(getattr(mixer, "groups", ())) for mixer in model.config.mixers())
    if parts["heads"]:
        ranked = Heads.model_validate_json((FOLDER / "heads.json").read_text(encoding="utf-8")).places
        count = max(1, round(int(parts["heads"]) / 100 * len(ranked)))
        groups: dict[int, list[int]] = {}
        for layer, group in ranked[:count]:
            groups.setdefault(layer, []).append(group)
        model.keep_heads(groups)
    return _in(model, dtype), tokenizer, count


def _in(model: Any, dtype: str | None) -> Any:
    return model if dtype is None else model.to(getattr(torch, dtype))


def questions(ruler: Ruler, hay: Hay, test: str, length: int, items: int) -> list[HiddenFact]:
    """The same for every variant, each drawn from its own seed."""
    drawn = []
    for item in range(items):
        rng = random.Random(f"{SEED} {test} {length} {item}")
        if test == "passkey":
            drawn.append(passkey_question(ruler, PASS_KEY, rng, length=length))
        elif test == "needle":
            drawn.append(needle_question(ruler, hay, rng, length=length, depth=rng.random()))
        elif test == "multikey":
            drawn.append(multikey_question(ruler, hay, rng, length=length, keys=KEYS))
        else:
            drawn.append(multivalue_question(ruler, hay, rng, length=length, values=VALUES))
    return drawn


def measure(name: str, options: argparse.Namespace) -> None:
    """All cells of a variant that are not kept yet."""
    known = _kept(name).recall
    cells = [(test, length) for test in options.tests for length in options.lengths]
    missing = [(test, length) for test, length in cells if known.get(test, {}).get(length, (0, 0))[1] < options.items]
    if not missing:
        return
    model, tokenizer, groups = build(name, options.teacher, options.dtype)
    torch.set_flush_denormal(True)
    documents = load_documents(list(options.text), tokenizer)
    ruler, hay = Ruler(tokenizer), Hay([tokenizer.decode(document.tokens[:20_000]) for document in documents])
    for test, length in missing:
        begun, right = time.monotonic(), 0
        for question in questions(ruler, hay, test, length, options.items):
            right += answer_greedily(model, tokenizer, [question])[0].correct
        done = _kept(name)
        done.groups_kept = groups
        done.recall.setdefault(test, {})[length] = (right, options.items)
        print(f"{name}: {test} {length}: {right}/{options.items}, {time.monotonic() - begun:.0f} s", flush=True)
        _keep(done)


def measure_losses(names: Sequence[str], options: argparse.Namespace) -> None:
    """Losses of variants that were not measured at a length: all of them with one pass of the teacher."""
    guide, tokenizer = load_any(options.teacher)
    documents = load_documents(list(options.text), tokenizer)
    for length in options.losses:
        missing = [name for name in names if name != TEACHER and length not in _kept(name).losses]
        if not missing:
            continue
        rows = first_rows(documents, length, max(1, options.loss_tokens // length), tokenizer.eos_token_id)
        views = {name: View(model=build(name, options.teacher)[0]) for name in missing}
        loss, away = distances(guide, views, rows)
        for name in missing:
            done = _kept(name)
            done.losses[length] = Losses(documents=len(rows), teacher=loss, student=away[name])
            _keep(done)
            print(f"{name}: losses {length}: {away[name].gap.value:+.3f}", flush=True)


@torch.inference_mode()
def measure_decoding(names: Sequence[str], options: argparse.Namespace) -> None:
    """Bytes that each variant's cache holds after 4,096 tokens, and the median time of a token from there: a few tokens
    of one variant after a few of another, so that what else the machine does weighs on all alike. The teacher has a
    preallocated cache, and its bytes are those of 4,096 tokens."""
    models = {name: build(name, options.teacher, options.dtype) for name in names}
    documents = load_documents(list(options.text), next(iter(models.values()))[1])
    ids = torch.tensor([documents[0].tokens[: CONTEXT + TIMED]])
    caches, times = {}, dict[str, list[float]]()
    for name, (model, _, _) in models.items():
        extra = {}
        if name == TEACHER:
            extra = with_cache(model, StaticCache(config=model.config, max_cache_len=CONTEXT + TIMED))
        caches[name] = model(input_ids=ids[:, :CONTEXT], use_cache=True, logits_to_keep=1, **extra).past_key_values
        times[name] = []
        if options.dtype == "bfloat16":
            variant = _kept(name)
            variant.state_bytes = cache_bytes(caches[name])
            if name == TEACHER:
                variant.state_bytes = variant.state_bytes * CONTEXT // (CONTEXT + TIMED)
            _keep(variant, timed=True)
    for first in range(CONTEXT, CONTEXT + TIMED, IN_TURN):
        for name, (model, _, _) in models.items():
            for at in range(first, first + IN_TURN):
                begun = time.perf_counter()
                model(input_ids=ids[:, at : at + 1], use_cache=True, **with_cache(model, caches[name]))
                times[name].append(time.perf_counter() - begun)
    for name, seconds in times.items():
        variant = _kept(name)
        variant.decode_seconds[options.dtype] = median = statistics.median(seconds)
        _keep(variant, timed=True)
        print(f"{name}: {1e3 * median:.1f} ms, {variant.state_bytes} bytes", flush=True)


def _kept(name: str) -> Variant:
    """What was measured of a variant."""
    path = FOLDER / f"{name}.json"
    return Variant.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else Variant(name=name)


def _keep(variant: Variant, *, timed: bool = False) -> None:
    now = provenance(seed=SEED)
    if timed:
        variant.decode_provenance = now
    else:
        variant.provenance = now
    atomic_write_text(FOLDER / f"{variant.name}.json", variant.model_dump_json(indent=1))


def rank(options: argparse.Namespace) -> None:
    """Score the teacher's groups."""
    model, tokenizer = load_any(options.teacher)
    scores: HeadScores = head_scores(model, tokenizer, seed=SEED)
    heads = Heads(
        places=[(score.layer, score.group) for score in scores.heads], falls=[score.fall for score in scores.heads],
        answer=scores.answer, provenance=provenance(seed=SEED),
    )  # fmt: skip
    atomic_write_text(FOLDER / "heads.json", heads.model_dump_json(indent=1))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    ranks = commands.add_parser("heads", help="score the teacher's key/value groups")
    measures = commands.add_parser("measure", help="measure variants")
    measures.add_argument("variants", nargs="+", metavar="VARIANT")
    measures.add_argument("--text", action="append", required=True)
    measures.add_argument("--tests", nargs="+", choices=TESTS, default=list(TESTS))
    measures.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096])
    measures.add_argument("--items", type=int, default=16)
    measures.add_argument("--losses", nargs="*", type=int, default=[2048, 4096])
    measures.add_argument("--loss-tokens", type=int, default=32_768, help="held-out tokens at each length")
    times = commands.add_parser("decode", help="bytes and decode times of variants, in turn")
    times.add_argument("variants", nargs="+", metavar="VARIANT")
    times.add_argument("--text", action="append", required=True)
    for own in (ranks, measures, times):
        own.add_argument("--teacher", required=True)
    for own in (measures, times):
        own.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the arithmetic")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    if options.command == "heads":
        rank(options)
    elif options.command == "decode":
        measure_decoding(options.variants, options)
    else:
        for name in options.variants:
            measure(name, options)
        if options.losses:
            measure_losses(options.variants, options)


if __name__ == "__main__":
    main()
