"""The demo's text: stories that the embedded teacher writes, and recall documents made of them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linearize.evaluation.needles import RecallDocument, recall_document
from linearize.training.data.sampling import sample_documents

KEPT = Path("text", ".kept")  # what the teacher has written, until the demo is whole
STORY_TOKENS = 30_000
STORY_BATCH = 48
LONGEST_STORY = 384
RECALL_DOCUMENTS = 480
FACTS, QUESTIONS = (1, 4), (4, 10)
WORDS = (60, 200)
ASKED_AFTER_WORDS = (50, 100, 190)
ASKED_PER_DISTANCE = 24
HAY_OF_QUESTIONS = 0.2
_FACT = re.compile(r"\d|\bcode of\b")


@dataclass(frozen=True, kw_only=True)
class DemoText:
    """Files to convert with (paths relative to the demo's folder), and questions whose hay is in none of them."""

    files: tuple[str, ...]
    num_stories: int
    num_recall: int
    questions: tuple[RecallDocument, ...]


def write_text(
    teacher: Any, tokenizer: Any, folder: Path, *, seed: int, progress: Callable[[int, int], None] | None = None
) -> DemoText:
    """Sample stories from the teacher, hide facts in some of them, and write both to `folder/text/*.jsonl`."""
    documents = sample_documents(
        teacher, tokenizer, STORY_TOKENS,
        seed=seed, batch_size=STORY_BATCH, max_new_tokens=LONGEST_STORY, cache=folder / KEPT,
        progress=progress,
    )  # fmt: skip
    written = [text for d in documents if (text := tokenizer.decode(d.tokens, skip_special_tokens=True).strip())]
    hay = [story for story in written if not _FACT.search(story)]  # the teacher also writes facts of its own
    apart = max(1, round(HAY_OF_QUESTIONS * len(hay)))
    rng = random.Random(seed)
    recall = [_training_document(rng, hay[apart:]).text for _ in range(RECALL_DOCUMENTS)]
    kept = set(hay[:apart])
    stories = [story for story in written if story not in kept]
    files = (_write(folder, "text/stories.jsonl", stories), _write(folder, "text/recall.jsonl", recall))
    return DemoText(
        files=files, num_stories=len(stories), num_recall=len(recall), questions=recall_questions(hay[:apart], seed)
    )


def recall_questions(hay: Sequence[str], seed: int) -> tuple[RecallDocument, ...]:
    """Documents with one fact each, asked at the end, at each distance (among several, the teacher errs)."""
    rng = random.Random(seed + 1)
    return tuple(_question(rng, hay, words) for words in ASKED_AFTER_WORDS for _ in range(ASKED_PER_DISTANCE))


def _question(rng: random.Random, hay: Sequence[str], words: int) -> RecallDocument:
    """The best of a few documents: facts are put between sentences, and a long sentence can move one far away."""
    drawn = [
        recall_document(rng, hay, num_words=words + rng.randint(10, 40), num_facts=1, distance=words) for _ in range(8)
    ]
    return min(drawn, key=lambda item: abs(item.distance - words))


def _training_document(rng: random.Random, hay: Sequence[str]) -> RecallDocument:
    """A document as the teacher was trained on: several facts, asked again and again."""
    return recall_document(
        rng, hay, num_words=rng.randint(*WORDS), num_facts=rng.randint(*FACTS), num_questions=rng.randint(*QUESTIONS)
    )


def _write(folder: Path, name: str, texts: Sequence[str]) -> str:
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name
