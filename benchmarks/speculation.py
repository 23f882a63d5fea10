"""Speculation end to end: acceptance, accepted length and speed against plain decoding, by draft length.

Each seed draws its own prompts; a table gives the median over seeds and the range. `auto` goes from prompt to prompt
with what it learned, as calls of one process do; `auto new` begins anew with each.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.timing import SEED, parser, publish
from linearize.decoding.loading import load_any
from linearize.decoding.speculative import LookupDrafter, SpeculationResult, SpeculationStats, speculate
from linearize.decoding.speculative.draft_length import AcceptanceStats
from linearize.decoding.speculative.weight_layout import share_equal_weights
from linearize.errors import InputError
from linearize.modeling.export.prompts import prompts_in

PLAIN = "plain"
NEW = "auto new"
RANGES = ("speedup", "acceptance_rate", "mean_accepted_length")
Draft = PreTrainedModel | None


def read_prompts(paths: Sequence[Path], count: int, seed: int) -> list[str]:
    """`count` prompts in turn from files of rows with `turns` (the first one), or texts between blank lines.

    `seed` 0: the first ones of each file; any other: drawn with it.

    Raises:
        InputError: no prompt in the files.
    """
    lists = []
    for path in paths:
        lists.append(prompts_in(path))
        if seed:
            random.Random(seed).shuffle(lists[-1])
    result = [rows[i] for i in range(max(map(len, lists))) for rows in lists if i < len(rows)][:count]
    if not result:
        raise InputError(f"{', '.join(map(str, paths))}: no prompt in there; give rows with `turns`, or paragraphs")
    return result


def measure(
    target: PreTrainedModel,
    drafts: Mapping[str, Draft],
    prompts: Sequence[Sequence[int]],
    *,
    sizes: Sequence[int],
    new_tokens: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """One row per draft (None: prompt lookup) and draft length, next to plain decoding by transformers' `generate`.

    All configurations alternate on each prompt, `repeats` times, so that disturbances affect all alike. Every output is
    compared with plain greedy decoding, token for token. Raises RuntimeError where one differs.
    """
    counts: list[int | str] = [*sizes, "auto", NEW]
    known = {name: AcceptanceStats() for name in drafts}
    ways = [(name, k) for name in drafts for k in counts]
    stats: dict[tuple[str, int | str], list[SpeculationStats]] = {way: [] for way in ways}
    plain_seconds, plain_tokens = 0.0, 0
    plain(target, prompts[0], 4)
    for ids in [ids for _ in range(repeats) for ids in prompts]:
        expected, seconds = plain(target, ids, new_tokens)
        plain_seconds, plain_tokens = plain_seconds + seconds, plain_tokens + len(expected)
        for name, k in ways:
            learned = AcceptanceStats() if k == NEW else known[name]
            result = speculative(target, drafts[name], ids, k, new_tokens, learned)
            if result.tokens[0] != expected:
                raise RuntimeError(f"{name}, draft length {k}: not what plain greedy decoding gives for one prompt")
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


def speculative(
    target: PreTrainedModel, draft: Draft, ids: Sequence[int], k: int | str, new_tokens: int, known: AcceptanceStats
) -> SpeculationResult:
    """The same with draft tokens."""
    how: Any = LookupDrafter() if draft is None else draft
    settings: Any = {"draft_tokens": "auto" if k == NEW else k, "stats": known}
    return speculate(target, how, torch.tensor([list(ids)]), max_new_tokens=new_tokens, **settings)


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
        "chosen": {str(size): chosen[size] for size in sorted(chosen)} if k in ("auto", NEW) else None,
        "tokens": tokens,
    }


def over_seeds(by_seed: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The rows of several seeds as one: medians; the speed-ups and acceptance rates of all; counts added up."""
    results = []
    for rows in zip(*by_seed, strict=True):
        one = {name: _joined(name, [row[name] for row in rows if name in row]) for name in rows[0]}
        ranges = {name: [min(seen), max(seen)] for name in RANGES if (seen := [r[name] for r in rows if r.get(name)])}
        results.append(one | {f"{name}_range": values for name, values in ranges.items()})
    return results


def _joined(name: str, values: list[Any]) -> Any:
    if name in ("draft", "draft_tokens") or values[0] is None:
        return values[0]
    if name == "tokens":
        return sum(values)
    if isinstance(values[0], dict):
        return {size: sum(v.get(size, 0) for v in values) for size in sorted({size for v in values for size in v})}
    return median(values)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table: medians, and the range of the speed-up over seeds."""
    lines = [f"{'draft':24} {'drafted':>8} {'accepted':>8} {'length':>6} {'times':>6}  range"]
    for row in rows:
        rate, length = row.get("acceptance_rate"), row.get("mean_accepted_length")
        low, high = row.get("speedup_range", [row["speedup"]] * 2)
        shares = [f"{x:.2f}" if x is not None else "-" for x in (rate, length)]
        lines.append(
            f"{row['draft'][:24]:24} {row['draft_tokens']!s:>8} {shares[0]:>8} {shares[1]:>6} {row['speedup']:6.2f}  "
            f"{low:.2f}-{high:.2f}"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], stem: Path) -> None:
    """Speed-up against the draft length, a line per draft, `auto` as a dashed one; `.svg` and `.png`."""
    from linearize.metrics.plots import new_figure
    from linearize.metrics.theme import colours, legend_below

    names = list(dict.fromkeys(row["draft"] for row in rows if row["draft"] != PLAIN))
    with new_figure(stem) as (figure, (axis,)):
        for name, colour in colours(names).items():
            fixed = [row for row in rows if row["draft"] == name and isinstance(row["draft_tokens"], int)]
            auto = next(row["speedup"] for row in rows if row["draft"] == name and row["draft_tokens"] == "auto")
            axis.plot([r["draft_tokens"] for r in fixed], [r["speedup"] for r in fixed], "o-", color=colour, label=name)
            axis.axhline(auto, color=colour, linestyle="--", linewidth=1)
        axis.axhline(1.0, color="#888888", linewidth=1)
        axis.set(title="Speed against plain decoding", xlabel="draft length (dashed: auto)", ylabel="times as fast")
        legend_below(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and publish."""
    options = parser(__doc__)
    options.set_defaults(repeats=1)
    options.add_argument("--target", required=True)
    options.add_argument("--draft", nargs="*", default=[], metavar="NAME=PATH")
    options.add_argument("--lookup", action="store_true", help="also draft from the text itself")
    options.add_argument("--text", type=Path, nargs="+", required=True, help="files that prompts are taken from")
    options.add_argument("--prompts", type=int, default=20, help="how many of each seed")
    options.add_argument("--seed", default=str(SEED), help="one or more, as 0,1,2: each draws its own prompts")
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
    seeds = _seeds(chosen.seed)
    how = {name: getattr(chosen, name) for name in ("sizes", "new_tokens", "repeats")}
    by_seed = []
    for seed in seeds:
        prompts = _tokens(tokenizer, read_prompts(chosen.text, chosen.prompts, seed), chosen.prompt_tokens)
        by_seed.append(measure(target, drafts, prompts, **how))
    rows = over_seeds(by_seed)
    setting = {
        "target": _described(target, chosen.target),
        "drafts": {n: "the text itself" if m is None else _described(m, n) for n, m in drafts.items()},
        "bytes_shared": shared,
        "prompts": len(prompts),
        "seeds": seeds,
        "new_tokens": chosen.new_tokens,
        "threads": chosen.threads,
    }
    publish("at least 1.5 times plain decoding at the best setting; equal outputs", setting, rows, chosen.out)
    print(table(rows), file=sys.stderr)
    if chosen.out is not None:
        plot(rows, chosen.out.with_suffix(""))


def _seeds(text: str) -> list[int]:
    """Raises InputError for anything but whole numbers with commas between."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise InputError(f"--seed {text}: give whole numbers with commas between, as 0,1,2")
    return [int(part) for part in text.split(",")]


def _tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], most: int) -> list[list[int]]:
    """Prompts as tokens: the first one (BOS) and the last ones."""
    rows = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    return [row if len(row) <= most else [row[0], *row[len(row) - most + 1 :]] for row in rows]


def _described(model: PreTrainedModel, name: str) -> dict[str, Any]:
    layers = model.config.get_text_config().num_hidden_layers
    return {"name": Path(name).name, "layers": layers, "parameters": sum(p.numel() for p in model.parameters())}


if __name__ == "__main__":
    main()
