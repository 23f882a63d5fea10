"""Speculation end to end: acceptance, accepted length and speed against plain decoding, by number of guesses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from linearize.benchmarks.timing import parser, publish
from linearize.decoding.loading import load_any
from linearize.decoding.speculative import LookupDrafter, SpeculationResult, SpeculationStats, speculate
from linearize.decoding.speculative.sharing import share_equal_weights
from linearize.errors import InputError
from linearize.files import read_text

PLAIN = "plain"
Draft = PreTrainedModel | None


def read_prompts(paths: Sequence[Path], count: int) -> list[str]:
    """The first turns of `count` prompts, taken in turn from files of rows with `turns`, or texts between blank lines.

    Raises:
        InputError: no prompt in the files.
    """
    lists = []
    for path in paths:
        text = read_text(path)
        if path.suffix == ".jsonl":
            lists.append([json.loads(line)["turns"][0] for line in text.splitlines() if line.strip()])
        else:
            lists.append([part.strip() for part in text.split("\n\n") if part.strip()])
    found = [rows[i] for i in range(max(map(len, lists))) for rows in lists if i < len(rows)][:count]
    if not found:
        raise InputError(f"{', '.join(map(str, paths))}: no prompt in there; give rows with `turns`, or paragraphs")
    return found


def measure(
    target: PreTrainedModel,
    drafts: Mapping[str, Draft],
    prompts: Sequence[Sequence[int]],
    *,
    sizes: Sequence[int],
    new_tokens: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """One row per draft (None: prompt lookup) and number of guesses, beside plain decoding by transformers' `generate`.

    All ways take their turn on each prompt, `repeats` times round, so that disturbances hit all alike. Every output is
    compared with plain greedy decoding, token for token. Raises RuntimeError where one differs.
    """
    counts: list[int | str] = [*sizes, "auto"]
    ways = [(name, k) for name in drafts for k in counts]
    stats: dict[tuple[str, int | str], list[SpeculationStats]] = {way: [] for way in ways}
    plain_seconds, plain_tokens = 0.0, 0
    plain(target, prompts[0], 4)
    for ids in [ids for _ in range(repeats) for ids in prompts]:
        expected, seconds = plain(target, ids, new_tokens)
        plain_seconds, plain_tokens = plain_seconds + seconds, plain_tokens + len(expected)
        for name, k in ways:
            result = guessed(target, drafts[name], ids, k, new_tokens)
            if result.tokens[0] != expected:
                raise RuntimeError(f"{name}, {k} guesses: not what plain greedy decoding gives for one prompt")
            stats[name, k].append(result.stats)
    base = plain_seconds / plain_tokens
    rows = [{"draft": PLAIN, "draft_tokens": 0, "ms_per_token": 1000 * base, "tokens": plain_tokens, "speedup": 1.0}]
    return rows + [_row(name, k, stats[name, k], base) for name, k in ways]


def plain(target: PreTrainedModel, ids: Sequence[int], new_tokens: int) -> tuple[list[int], float]:
    """New tokens and seconds of plain greedy decoding, the prompt's reading included."""
    input_ids = torch.tensor([list(ids)], device=target.device)
    began = perf_counter()
    generate: Any = target.generate
    with torch.inference_mode():
        out = generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, max_new_tokens=new_tokens
        )
    return out[0, len(ids) :].tolist(), perf_counter() - began


def guessed(
    target: PreTrainedModel, draft: Draft, ids: Sequence[int], k: int | str, new_tokens: int
) -> SpeculationResult:
    """The same with guesses."""
    how: Any = LookupDrafter() if draft is None else draft
    size: Any = k
    return speculate(target, how, torch.tensor([list(ids)]), max_new_tokens=new_tokens, draft_tokens=size)


def _row(name: str, k: int | str, runs: Sequence[SpeculationStats], base: float) -> dict[str, Any]:
    drafted, accepted = sum(s.drafted for s in runs), sum(s.accepted for s in runs)
    tokens, passes = sum(s.tokens for s in runs), sum(s.target_passes for s in runs)
    rounds = sum(sum(s.lengths.values()) for s in runs)
    seconds = sum(s.seconds for s in runs) / tokens
    chosen: dict[int, int] = {}
    for one in runs:
        for size, times in one.draft_tokens.items():
            chosen[size] = chosen.get(size, 0) + times
    return {
        "draft": name,
        "draft_tokens": k,
        "acceptance_rate": accepted / drafted if drafted else None,
        "mean_accepted_length": accepted / rounds if rounds else None,
        "tokens_per_target_pass": tokens / passes,
        "target_passes_saved": 1 - passes / tokens,
        "ms_per_token": 1000 * seconds,
        "speedup": base / seconds,
        "chosen": {str(size): chosen[size] for size in sorted(chosen)} if k == "auto" else None,
        "tokens": tokens,
    }


def plot(rows: Sequence[Mapping[str, Any]], stem: Path) -> None:
    """Speed-up against the number of guesses, a line per draft, `auto` as a dashed one; `.svg` and `.png`."""
    from linearize.evaluation.plots import new_figure
    from linearize.evaluation.theme import colours, legend_below

    names = list(dict.fromkeys(row["draft"] for row in rows if row["draft"] != PLAIN))
    with new_figure(stem) as (figure, (axis,)):
        for name, colour in colours(names).items():
            fixed = [row for row in rows if row["draft"] == name and row["draft_tokens"] != "auto"]
            auto = next(row["speedup"] for row in rows if row["draft"] == name and row["draft_tokens"] == "auto")
            axis.plot([r["draft_tokens"] for r in fixed], [r["speedup"] for r in fixed], "o-", color=colour, label=name)
            axis.axhline(auto, color=colour, linestyle="--", linewidth=1)
        axis.axhline(1.0, color="#888888", linewidth=1)
        axis.set(title="Speed against plain decoding", xlabel="guesses a round (dashed: auto)", ylabel="times as fast")
        legend_below(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    options = parser(__doc__)
    options.set_defaults(repeats=1)
    options.add_argument("--target", required=True)
    options.add_argument("--draft", nargs="*", default=[], metavar="NAME=PATH")
    options.add_argument("--lookup", action="store_true", help="also guess from the text itself")
    options.add_argument("--prompts", type=Path, nargs="+", required=True)
    options.add_argument("--count", type=int, default=20)
    options.add_argument("--prompt-tokens", type=int, default=64, help="only so many of a prompt's last tokens")
    options.add_argument("--new-tokens", type=int, default=96)
    options.add_argument("--sizes", type=int, nargs="+", default=list(range(1, 9)))
    chosen = options.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    target, tokenizer = load_any(chosen.target, device="cpu")
    drafts: dict[str, Draft] = {}
    shared = {}
    for entry in chosen.draft:
        name, _, path = entry.partition("=")
        model = load_any(path, device="cpu")[0]
        shared[name] = share_equal_weights(model, target)
        drafts[name] = model
    if chosen.lookup:
        drafts["prompt lookup"] = None
    prompts = _tokens(tokenizer, read_prompts(chosen.prompts, chosen.count), chosen.prompt_tokens)
    rows = measure(
        target, drafts, prompts, sizes=chosen.sizes, new_tokens=chosen.new_tokens, repeats=chosen.repeats
    )  # fmt: skip
    setting = {
        "target": _described(target, chosen.target),
        "drafts": {n: "the text itself" if m is None else _described(m, n) for n, m in drafts.items()},
        "bytes_shared": shared,
        "prompts": len(prompts),
        "new_tokens": chosen.new_tokens,
        "threads": chosen.threads,
    }
    publish("at least 1.5 times plain decoding at the best setting; equal outputs", setting, rows, chosen.out)
    if chosen.out is not None:
        plot(rows, chosen.out.with_suffix(""))


def _tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], most: int) -> list[list[int]]:
    """Prompts as tokens: the first one (BOS) and the last ones."""
    rows = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    return [row if len(row) <= most else [row[0], *row[len(row) - most + 1 :]] for row in rows]


def _described(model: PreTrainedModel, name: str) -> dict[str, Any]:
    layers = model.config.get_text_config().num_hidden_layers
    return {"name": Path(name).name, "layers": layers, "parameters": sum(p.numel() for p in model.parameters())}


if __name__ == "__main__":
    main()
