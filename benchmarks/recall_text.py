"""Text that asks for what it held: passages of novels with invented facts, which its end repeats or asks for.

    python -m benchmarks.recall_text --text a.jsonl --out lookups.jsonl --documents 200

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

FACTS, REPEATED, ASKED, WORDS = 8, 4, 5, 1100
FEWEST = 100  # sentences of a text that passages are taken from
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
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
    options = parser.parse_args(arguments)
    texts = [
        json.loads(line)["text"] for path in options.text for line in Path(path).read_text("utf-8").split("\n") if line
    ]
    made = documents(texts, options.documents)
    Path(options.out).write_text("".join(json.dumps({"text": text}) + "\n" for text in made), encoding="utf-8")


def documents(texts: Sequence[str], count: int, seed: int = 0) -> Iterator[str]:
    """`count` documents of about `WORDS` words, from random places of the texts."""
    rng = random.Random(seed)
    cut = [[body for _, body in sentences(text) if 3 < len(body.split()) < 40] for text in texts]
    cut = [source for source in cut if len(source) >= FEWEST]
    if not cut:
        raise SystemExit(f"no text of at least {FEWEST} sentences: give longer ones")
    for _ in range(count):
        source = cut[rng.randrange(len(cut))]
        start, passage, words = rng.randrange(len(source) // 2), [], 0
        while words < WORDS and start < len(source):
            passage.append(source[start])
            words, start = words + len(source[start].split()), start + 1
        repeated = rng.sample(passage, REPEATED)
        form, facts = rng.choice(FORMS), dict(_fact(rng) for _ in range(FACTS))
        stated = [form.format(name=name, value=value) + "." for name, value in facts.items()]
        asked = rng.sample(stated, ASKED)
        for fact in stated:
            passage.insert(rng.randrange(len(passage) + 1), fact)
        end = [*repeated, *asked]
        rng.shuffle(end)
        yield " ".join([*passage, *end])


def _fact(rng: random.Random) -> tuple[str, str]:
    name = "".join(rng.choice(SYLLABLES) for _ in range(rng.randrange(2, 4))).capitalize()
    return name, str(rng.randrange(10 ** rng.randrange(2, 6)))


if __name__ == "__main__":
    main()
