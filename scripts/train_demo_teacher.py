"""Train the small Llama that ships with linearize: it writes simple stories and recalls short facts from far back.

    python scripts/train_demo_teacher.py --data train_a.txt train_b.txt --minutes 60 --out teacher

Runs on one CUDA GPU when there is one, else on the CPU. `--minutes` bounds the whole run, measurements included; with
`--steps` instead, the same seed and machine give the same batches and schedule. The folder is written whenever a
measurement is the best so far; SIGINT or SIGTERM ends training early, with the last measurements.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from demo_teacher.batches import CURRICULA, BatchPlan, RecallAndStories
from demo_teacher.measure import heldout_loss, recall_accuracy, recall_questions, recall_table
from demo_teacher.model import add_dropout, build_model
from demo_teacher.saving import check_tokenizer, folder_bytes, load_teacher, save_teacher, write_provenance
from demo_teacher.text import Stories, read_stories, tokens_per_word, train_tokenizer
from demo_teacher.training import Clock, Curriculum, Evaluations, Measure, Run, Schedule, make_optimizers, train
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

EVALUATION_SEED = 20_000
PATHS = ("data", "out", "start_from")
FINAL_SECONDS = {"cuda": 30.0, "cpu": 180.0}
"""Kept free at the end of `--minutes` for saving and the last measurements."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="story files, a blank line between stories")
    parser.add_argument("--out", type=Path, required=True, help="the teacher's folder, created if need be")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="wall clock for everything")
    length.add_argument("--steps", type=int, help="exact number of steps instead of a time")
    parser.add_argument("--start-from", type=Path, help="go on from the weights and tokenizer of this teacher's folder")
    parser.add_argument("--curriculum", choices=list(CURRICULA), default="few", help="facts in a recall document")
    parser.add_argument("--level", type=int, default=0, help="of the curriculum at the start")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches; 0 makes them in the loop")
    for name, default in {"vocab": 2048, "width": 128, "layers": 4, "mlp": 384, "kv-heads": 2, "context": 1024}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in {"recall-tokens": 2048, "stories": 8, "evaluations": 24, "questions": 100}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    rates = {"lr": 2.5e-3, "muon-lr": 0.02, "dropout": 0.05, "weight-decay": 0.1, "ema": 0.995}
    weights = {"answer-weight": 16.0, "hay-weight": 0.5, "hay-share": 0.15}
    for name, value in {**rates, **weights}.items():
        parser.add_argument(f"--{name}", type=float, default=value)
    return parser.parse_args()


def main() -> None:
    """Text, tokenizer, training, saving, measuring what was saved."""
    args, started = arguments(), time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    stories = read_stories(args.data)
    model, tokenizer = _start(args, stories)
    ratio = tokens_per_word(tokenizer, stories.train)
    print(
        f"{len(stories.train)} stories, {len(stories.heldout)} held out, {ratio:.3f} tokens a word, {device}",
        flush=True,
    )

    model.to(device)
    add_dropout(model, args.dropout)
    plan = BatchPlan(
        recall_tokens=args.recall_tokens,
        num_stories=args.stories,
        curriculum=args.curriculum,
        context=args.context,
        answer_weight=args.answer_weight,
        hay_weight=args.hay_weight,
        hay_share=args.hay_share,
        seed=args.seed,
    )
    measure = _measure(tokenizer, stories.heldout, stories.heldout_hay, ratio, context=args.context)
    seconds = (args.minutes or 0.0) * 60 - FINAL_SECONDS[device] - (time.monotonic() - started)
    clock = Clock(Schedule(steps=args.steps, seconds=max(seconds, 1.0)))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, clock.stop)
    curriculum = Curriculum(args.level)
    dataset = RecallAndStories(tokenizer, stories.train, stories.train_hay, plan, ratio, curriculum)

    def keep(best: LlamaForCausalLM, run: Run) -> None:
        save_teacher(best, tokenizer, args.out)
        write_provenance(args.out, data=args.data, facts=_facts(args, run, {}, wall_seconds=time.monotonic() - started))

    run = train(
        model,
        dataset,
        clock,
        curriculum,
        Evaluations(count=args.evaluations, measure=measure, keep=keep),
        make_optimizers(model, lr=args.lr, muon_lr=args.muon_lr, weight_decay=args.weight_decay),
        ema_decay=args.ema,
        workers=args.workers,
    )
    again, tokenizer_again = load_teacher(args.out)
    check_tokenizer(tokenizer, tokenizer_again, stories.heldout[:100])
    again.to(device)
    results = _results(args, again, tokenizer, stories, ratio)
    facts = _facts(args, run, results, wall_seconds=time.monotonic() - started)
    write_provenance(args.out, data=args.data, facts=facts)
    print(results, f"{folder_bytes(args.out)} bytes, {facts['wall_seconds']} s", flush=True)


def _start(args: argparse.Namespace, stories: Stories) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A new model and tokenizer, or those of `--start-from`."""
    if args.start_from:
        return load_teacher(args.start_from)
    tokenizer = train_tokenizer(stories.train, args.vocab, args.seed)
    model = build_model(
        vocab_size=args.vocab,
        width=args.width,
        layers=args.layers,
        mlp=args.mlp,
        kv_heads=args.kv_heads,
        context=args.context,
    )
    return model, tokenizer


def _measure(
    tokenizer: PreTrainedTokenizerFast, heldout: tuple[str, ...], hay: tuple[str, ...], ratio: float, *, context: int
) -> Measure:
    """The quick measurement during training: all held-out stories, and 16 questions at each of four distances."""
    distances = [distance for distance in (60, 200, 500, 850) if distance <= 0.85 * context]
    questions = [
        question
        for distance in distances
        for question in recall_questions(
            tokenizer, hay, distance, count=16, context=context, ratio=ratio, seed=EVALUATION_SEED
        )
    ]
    return lambda model: (
        heldout_loss(model, tokenizer, heldout, context // 2),
        recall_accuracy(model, questions),
    )


def _results(
    args: argparse.Namespace,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    stories: Stories,
    ratio: float,
) -> dict[str, Any]:
    """Losses, and recall by distance where one fact is hidden and where one of one to four is asked."""
    half = args.context // 2
    recall = {
        name: recall_table(
            model,
            tokenizer,
            stories.heldout_hay,
            count=args.questions,
            context=args.context,
            ratio=ratio,
            seed=EVALUATION_SEED + 1,
            most_facts=most_facts,
        )
        for name, most_facts in (("one_fact", 1), ("one_to_four_facts", 4))
    }
    return {
        "heldout_loss": heldout_loss(model, tokenizer, stories.heldout, half),
        "train_loss_same_kind": heldout_loss(model, tokenizer, stories.train[:: len(stories.train) // 100], half),
        "recall": recall,
    }


def _facts(args: argparse.Namespace, run: Run, results: dict[str, Any], *, wall_seconds: float) -> dict[str, Any]:
    names = {str(path): path.name for path in [*args.data, args.out]}
    earlier = {}
    if args.start_from:
        names[str(args.start_from)] = args.start_from.name
        earlier = {"started_from": json.loads((args.start_from / "PROVENANCE.json").read_text(encoding="utf-8"))}
    return {
        "command": shlex.join(["python", "scripts/train_demo_teacher.py", *(names.get(o, o) for o in sys.argv[1:])]),
        "settings": {name: value for name, value in vars(args).items() if name not in PATHS},
        "seed": args.seed,
        "steps": run.steps,
        "tokens": run.tokens,
        "kept_step": run.best_step,
        **results,
        "log": run.log,
        "wall_seconds": round(wall_seconds, 1),
        **earlier,
    }


if __name__ == "__main__":
    main()
