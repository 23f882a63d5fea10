"""Text that asks for what it held: passages of novels with invented facts, which its end repeats or asks for.

    python -m benchmarks.recall_text --text a.jsonl --out lookups.jsonl --documents 200
    python -m benchmarks.recall_text --text a.jsonl --out dense.jsonl --words 280 --facts 6 --asked 6 --seed 1

Each document is a passage with facts about invented names in random places, then some of its own sentences once more
and some of its facts asked for, in random order. Statements, names and numbers differ from those that
`linearize eval --recall` asks for: what is trained is looking up, not the answers of a test.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from linearize.evaluation.needles import sentences
from linearize.metrics.head_scores import SYLLABLES

REPEATED = 4  # sentences
MOST = 50  # facts
FEWEST = 100  # sentences of a text that passages are taken from
FORMS = (
    "The number that {name} wrote down was {value}", "{name} keeps {value} in the drawer", "{name} lives at {value}",
    "The price of a {name} is {value} pounds", "In the year {value} the ship {name} was lost",
    "The {name} society has {value} members", "{name} answered with the word {value}",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--words", type=int, default=1100, help="of a passage")
    parser.add_argument("--facts", type=int, default=8, help="in a passage")
    parser.add_argument("--asked", type=int, default=5, help="of its facts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    texts = [
        json.loads(line)["text"] for path in options.text for line in Path(path).read_text("utf-8").split("\n") if line
    ]
    if options.asked > options.facts or options.facts > MOST:
        raise SystemExit(
            f"--facts {options.facts} --asked {options.asked}: give at most {MOST}, and ask for those alone"
        )
    rng = random.Random(options.seed)
    made = documents(texts, options.documents, rng, words=options.words, facts=options.facts, asked=options.asked)
    Path(options.out).write_text("".join(json.dumps({"text": text}) + "\n" for text in made), encoding="utf-8")


def documents(
    texts: Sequence[str], count: int, rng: random.Random, *, words: int, facts: int, asked: int
) -> Iterator[str]:
    """`count` documents with passages of about `words` words, from random places of the texts."""
    cut = [[body for _, body in sentences(text) if 3 < len(body.split()) < 40] for text in texts]
    cut = [source for source in cut if len(source) >= FEWEST]
    if not cut:
        raise SystemExit(f"no text of at least {FEWEST} sentences: give longer ones")
    for _ in range(count):
        source = cut[rng.randrange(len(cut))]
        start, passage, read = rng.randrange(len(source) // 2), list[str](), 0
        while start < len(source) and (read < words or len(passage) < REPEATED):
            passage.append(source[start])
            read, start = read + len(source[start].split()), start + 1
        end, form, values = rng.sample(passage, REPEATED), rng.choice(FORMS), dict[str, str]()
        while len(values) < facts:
            values |= [_fact(rng)]
        stated = [form.format(name=name, value=value) + "." for name, value in values.items()]
        for fact in stated:
            passage.insert(rng.randrange(len(passage) + 1), fact)
        end += rng.sample(stated, asked)
        rng.shuffle(end)
        yield " ".join([*passage, *end])


def _fact(rng: random.Random) -> tuple[str, str]:
    name = "".join(rng.choice(SYLLABLES) for _ in range(rng.randrange(2, 4))).capitalize()
    return name, str(rng.randrange(10 ** rng.randrange(2, 6)))


if __name__ == "__main__":
    main()
