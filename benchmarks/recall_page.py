"""The table and the plot of `benchmarks.recall`, made from `benchmarks/recall/*.json`.

    python -m benchmarks.recall_page

Writes `benchmarks/recall/README.md`, with a plot of right answers by exact pairs and by retrieval heads.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.recall import FOLDER, TESTS, VARIANT
from benchmarks.smollm2 import HYBRIDS, MIXERS, ROWS, STARTS
from benchmarks.smollm2_measure import TEACHER, Variant
from benchmarks.smollm2_page import table
from linearize.metrics.intervals import wilson
from linearize.metrics.plots import figure_files, new_figure

PAGE = FOLDER / "README.md"
HYBRID_ROWS = {name for name, row in ROWS.items() if row.recipe in HYBRIDS.values()}  # without store or heads to plot
TRAINED_WITH = {
    "window-linear-recall": {"store": 128, "heads": 5},
    "window-linear-retrieval": {"store": 128, "heads": 6},
}
PANELS = (
    ("passkey", 4096, "store", "exact pairs of each key/value head"),
    ("multikey", 1024, "heads", "% of key/value groups with softmax"),
)


def page() -> None:
    """A table and a plot of all variants that were measured."""
    paths = sorted(path for path in FOLDER.glob("*.json") if path.name != "heads.json")
    variants = [Variant.model_validate_json(path.read_text(encoding="utf-8")) for path in paths]
    variants.sort(key=lambda variant: _place(variant.name))
    asked = sorted(
        {
            (TESTS.index(test), length)
            for variant in variants
            for test, cells in variant.recall.items()
            for length in cells
        }
    )
    teacher = next(variant for variant in variants if variant.name == TEACHER)

    def line(variant: Variant) -> list[str]:
        gaps = [variant.losses.get(length) for length in (2048, 4096)]
        cells = [variant.recall.get(TESTS[test], {}).get(length) for test, length in asked]
        share = (
            f" ({variant.state_bytes / teacher.state_bytes:.0%})" if variant.state_bytes and teacher.state_bytes else ""
        )
        return [
            f"`{variant.name}`",
            *("" if cell is None else f"{cell[0]}/{cell[1]}" for cell in cells),
            *("" if gap is None or gap.student is None else f"{gap.student.gap.value:+.3f}" for gap in gaps),
            "" if variant.state_bytes is None else f"{variant.state_bytes / 1e6:.2f} MB{share}",
            "" if (time := variant.decode_seconds.get("bfloat16")) is None else f"{1e3 * time:.1f}",
        ]

    head = ["variant", *(f"{TESTS[test]} {length:,}" for test, length in asked)]
    head += ["gap at 2,048", "gap at 4,096", "state at 4,096", "ms a token, bf16"]
    text = [
        "# Recall of SmolLM2's students", "",
        "Made by `python -m benchmarks.recall_page` from the JSON files beside it. Right answers of all, generated "
        "greedily; gaps in nats a token to the teacher on the first 4 novels (2,048 tokens) and 2 novels (4,096) that "
        "nothing was trained on, the same for all; the share of the state is that of the teacher's cache. `+storeN`: N "
        "exact pairs of a key/value head; `+headsP`: P percent of the key/value groups with their softmax attention; "
        "both given to the trained student without training (softmax in a window has no store). `ROW-mixers`: the "
        "row's student without its LoRA; hybrids are not in the plot. "
        "A token: at 4,096 tokens of context, in turn, on one core (the other one "
        "busy), the teacher with a preallocated cache.", "",
        "`window-linear-recall` was trained with 128 pairs and 4 of 90 groups (those with the largest falls), at 4,096 "
        "tokens. `window-linear-retrieval` has the mixers of `window-linear`, new LoRA, and from the start 128 pairs "
        "and the 5 groups that are ranked first together. 2, 5, 6 and 10 percent of the groups are 2, 4, 5 and 9.", "",
        table(head, map(line, variants)), "", "![Answers by store and by retrieval heads](grid.svg)", "",
    ]  # fmt: skip
    PAGE.write_text("\n".join(text), encoding="utf-8")
    plot(variants)
    print(PAGE, *figure_files(FOLDER, "grid"))


def _place(name: str) -> tuple[int, int, int, str]:
    """Where a variant stands in the table: by row, then by heads, then by store."""
    parts = VARIANT.fullmatch(name)
    assert parts is not None, name
    order = [TEACHER, *(name + kind for name in (*ROWS, *STARTS) for kind in ("", MIXERS))]
    return order.index(parts["row"]), int(parts["heads"] or 0), int(parts["store"] or 0), name


def plot(variants: Sequence[Variant]) -> None:
    """Right answers by exact pairs and by retrieval heads."""
    with new_figure(FOLDER / "grid", panels=2, width=9.0, height=4.0) as (_, axes):
        for axis, (test, length, kind, label) in zip(axes, PANELS, strict=True):
            lines = _lines(variants, test, length, kind)
            sizes = sorted({size for points in lines.values() for size in points})
            for at, (row, points) in enumerate(lines.items()):
                if row == TEACHER:
                    axis.axhline(points[0][0] / points[0][1], color="black", linewidth=1, linestyle="--", label=row)
                    continue
                where = [sizes.index(size) + 0.06 * (at - len(lines) / 2) for size in sorted(points)]
                shares = [(right / items, *wilson(right, items)) for _, (right, items) in sorted(points.items())]
                errors = [[value - low for value, low, _ in shares], [high - value for value, _, high in shares]]
                axis.errorbar(where, [value for value, *_ in shares], yerr=errors, marker="o", capsize=3, label=row)
            axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
            axis.set(title=f"{test} at {length:,} tokens", xlabel=label, ylabel="exact answers", ylim=(-0.03, 1.03))
            axis.legend(fontsize=7)


def _lines(variants: Sequence[Variant], test: str, length: int, kind: str) -> dict[str, dict[int, tuple[int, int]]]:
    """Right answers and items of each row by its store or its heads (`kind`), the other one as it was trained with."""
    other = "heads" if kind == "store" else "store"
    lines: dict[str, dict[int, tuple[int, int]]] = {}
    for variant in variants:
        parts, cell = VARIANT.fullmatch(variant.name), variant.recall.get(test, {}).get(length)
        if parts is not None and cell is not None and not parts[other] and parts["row"] not in HYBRID_ROWS:
            row = parts["row"]
            lines.setdefault(row, {})[int(parts[kind] or TRAINED_WITH.get(row, {}).get(kind, 0))] = cell
    return lines


if __name__ == "__main__":
    page()
