"""The results of all methods as tables in Markdown, with "not measured" where there is none.

    python -m benchmarks.peers.table            # prints them
    python -m benchmarks.peers.table --write    # puts them into benchmarks/peers/README.md

Reads every JSON file of `benchmarks/peers/results/`. Files of one method must measure different things, and all files
must come from one machine, teacher and text.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"
MARKS = ("<!-- results -->\n", "<!-- end of results -->\n")
MISSING = "not measured"
TITLES = {
    "teacher": "teacher",
    "lolcats-published": "LoLCATs, published code",
    "lolcats": "`lolcats`",
    "window-linear": "`window-linear`",
    "mamba-published": "The Mamba in the Llama, published code on references",
    "mamba": "`mamba`",
}
PARTS = ("loss", "steps", "contexts", "differences", "decoding_difference")
STEPS = (128, 256, 512, 1024, 2048)
CONTEXTS = (1024, 2048, 4096, 8192)
Results = dict[str, dict[str, Any]]


def load(folder: Path) -> Results:
    """What was measured, by method.

    Raises:
        ValueError: an unknown method, a part that two files have, or files that cannot be compared.
    """
    results: Results = {}
    sources: dict[str, Path] = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        method, source = document.get("method"), comparable(document)
        if method not in TITLES:
            raise ValueError(f"{path.name}: method {method!r}: allowed are {', '.join(TITLES)}")
        sources.setdefault(source, path)
        if len(sources) > 1:
            first, other = sources.items()
            raise ValueError(f"{other[1].name} is from {other[0]}, {first[1].name} from {first[0]}: measure both alike")
        known = results.setdefault(method, {"provenance": [], "source": source})
        if twice := [part for part in PARTS if part in known and part in document]:
            raise ValueError(f"{path.name}: {twice[0]} of {method} is in another file too: keep one of them")
        known |= {part: document[part] for part in PARTS if part in document}
        known["provenance"].append(document["provenance"])
    return results


def comparable(document: dict[str, Any]) -> str:
    """What results must share to be in one table, in words."""
    setting, hardware = document["setting"], document["provenance"]["hardware"]
    layers = "all layers" if setting["layers"] is None else f"{setting['layers']} layers"
    gpus = "".join(f", {gpu}" for gpu in hardware["gpus"]) if setting.get("device") == "cuda" else ""
    return (
        f"{setting['teacher']} ({layers}, {setting['dtype']}), text {setting['text_digest']}, {hardware['cpu']} with "
        f"{hardware['threads']} threads{gpus}"
    )


def render(results: Results) -> str:
    """All tables, and what they were measured on."""
    steps, contexts = _lengths("steps", STEPS, results), _lengths("contexts", CONTEXTS, results)
    tables = [
        _table("Training step, tokens per second, by its tokens", steps, _speed, results),
        _table("Training step, peak memory in GB, by its tokens", steps, _step_memory, results),
        _table("Training run", tuple(TRAINING), lambda result, column: TRAINING[column](result["loss"]), results),
        _table("Prefill, seconds, by context", contexts, lambda r, n: f"{_context(r, n, 'prefill'):.3g}", results),
        _table("Prefill, peak memory in GB, by context", contexts, _context_memory, results),
        _table("Decoding, ms per token, by context", contexts, lambda r, n: f"{_context(r, n, 'decode'):.3g}", results),
    ]
    return "\n".join([*tables, _footer(results)])


def _table(title: str, columns: Sequence[Any], cell: Callable[[dict[str, Any], Any], str], results: Results) -> str:
    """A table with a method in each row."""
    lines = [["", *map(str, columns)], ["---", *["---:"] * len(columns)]]
    lines += [[title, *(_cell(cell, results.get(name), n) for n in columns)] for name, title in TITLES.items()]
    return f"{title}:\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(cell: Callable[[dict[str, Any], Any], str], result: dict[str, Any] | None, column: Any) -> str:
    try:
        return MISSING if result is None else cell(result, column)
    except KeyError:
        return MISSING


def _footer(results: Results) -> str:
    """The machine, the commits, and how close our attention is to the published one."""
    origins = [origin for result in results.values() for origin in result["provenance"]]
    peers = {f"{o['repository']['name']} {o['repository']['commit'][:7]}" for o in origins if o["repository"]}
    ours = {str(o["commit"])[:7] for o in origins}
    loads = [origin["load"] for origin in origins]
    difference = results.get("lolcats", {}).get("differences")
    near = MISSING if difference is None else f"{difference['attention']:.1e}"
    lines = [f"Difference of the attention of `lolcats` from the published code's, in parts of the largest: {near}."]
    if results:
        lines.append(
            f"Measured on {next(iter(results.values()))['source']}; load at the start {max(loads):.1f} at most."
        )
        lines.append(
            f"Commits: {', '.join([*sorted(peers), *(f'this repository {commit}' for commit in sorted(ours))])}."
        )
    return "\n".join(lines) + "\n"


def _lengths(part: str, usual: tuple[int, ...], results: Results) -> list[int]:
    """The usual lengths, and all others that were measured."""
    return sorted({int(n) for result in results.values() for n in result.get(part, {})} | set(usual))


def _speed(result: dict[str, Any], tokens: int) -> str:
    return f"{tokens / result['steps'][str(tokens)]['seconds']:.4g}"


def _step_memory(result: dict[str, Any], tokens: int) -> str:
    return _size(result["steps"][str(tokens)])


def _context(result: dict[str, Any], tokens: int, what: str) -> float:
    """Seconds of a prefill, ms of a decoded token."""
    run = result["contexts"][str(tokens)][what]
    return float(run["seconds"] if what == "prefill" else 1000 * run["seconds"] / run["tokens"])


def _context_memory(result: dict[str, Any], tokens: int) -> str:
    return _size(result["contexts"][str(tokens)]["prefill"])


def _size(run: dict[str, Any]) -> str:
    return MISSING if run["peak_bytes"] is None else f"{run['peak_bytes'] / 1e9:.2f}"


def _gap(loss: dict[str, Any], when: str) -> str:
    """Mean over held-out documents, and its standard error."""
    gaps = [student - teacher for student, teacher in zip(loss[when], loss["teacher"], strict=True)]
    error = f" ({statistics.stdev(gaps) / math.sqrt(len(gaps)):.2g})" if len(gaps) > 1 else ""
    return f"{statistics.mean(gaps):.3f}{error}"


TRAINING: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens": lambda loss: str(loss["tokens"]),
    "tokens per second": lambda loss: f"{loss['tokens'] / loss['seconds']:.4g}",
    "peak memory in GB": _size,
    "loss above the teacher before, nats per token": lambda loss: _gap(loss, "before"),
    "after": lambda loss: _gap(loss, "after"),
}


def write(text: str, page: Path) -> None:
    """Put the tables between the marks of a page. Raises ValueError for a page without them."""
    before = page.read_text(encoding="utf-8")
    if not (marked := re.search(f"{MARKS[0]}.*{MARKS[1]}", before, flags=re.DOTALL)):
        raise ValueError(f"{page}: no lines {MARKS[0].strip()} and {MARKS[1].strip()}: add them where tables belong")
    start, end = marked.span()
    page.write_text(f"{before[:start]}{MARKS[0]}{text}{MARKS[1]}{before[end:]}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print or write."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--folder", type=Path, default=FOLDER)
    made.add_argument("--write", action="store_true", help="into README.md, between its marks")
    options = made.parse_args(arguments)
    try:
        text = render(load(options.folder))
        if options.write:
            write(text, README)
    except ValueError as error:
        made.error(str(error))
    if not options.write:
        print(text, end="")


if __name__ == "__main__":
    main()
