"""Story files in, training and held-out stories out; the tokenizer is trained on them and on recall documents."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from linearize.evaluation.needles import recall_document

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
HELDOUT_EVERY = 40
"""Every 40th story of each file is held out and never trained on, neither as a story nor as hay."""

_PLAIN = str.maketrans(
    {"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2014": "-", "\u2013": "-", "\u2026": "..."}
)


@dataclass(frozen=True, kw_only=True)
class Stories:
    """Story texts: `train` and `heldout` share none; the `hay` lists are those of them that hold no digit."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]

    @property
    def train_hay(self) -> tuple[str, ...]:
        """Training stories without digits."""
        return _without_digits(self.train)

    @property
    def heldout_hay(self) -> tuple[str, ...]:
        """Held-out stories without digits."""
        return _without_digits(self.heldout)


def read_stories(paths: Sequence[Path]) -> Stories:
    """Read files of stories separated by blank lines.

    Curly punctuation is made plain; stories with other non-ASCII characters are left out. A held-out story that also
    stands among the training stories (same first 200 letters) is dropped from training.
    """
    train: list[str] = []
    heldout: list[str] = []
    for path in paths:
        stories = [story.strip() for story in path.read_text(encoding="utf-8").translate(_PLAIN).split("\n\n")]
        kept = [story for story in stories if story and story.isascii()]
        for index, story in enumerate(kept):
            (heldout if index % HELDOUT_EVERY == 0 else train).append(story)
    seen = {_letters(story) for story in heldout}
    return Stories(train=tuple(story for story in train if _letters(story) not in seen), heldout=tuple(heldout))


def train_tokenizer(stories: Sequence[str], vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, one token per digit, `<s>` put in front; ids 0, 1, 2 are `<pad>`, `<s>`, `</s>`."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(seed)
    hay = _without_digits(stories)
    recalls = [recall_document(rng, hay, num_words=60, num_facts=4, num_questions=4).text for _ in range(1000)]
    tokenizer.train_from_iterator([*stories, *recalls], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def tokens_per_word(tokenizer: PreTrainedTokenizerFast, stories: Sequence[str]) -> float:
    """Mean tokens in a word of `stories`, measured on at most 500 of them."""
    sample = stories[:500]
    tokens = sum(len(tokenizer(story, add_special_tokens=False)["input_ids"]) for story in sample)
    return tokens / sum(len(story.split()) for story in sample)


def _without_digits(stories: Sequence[str]) -> tuple[str, ...]:
    return tuple(story for story in stories if not re.search(r"\d", story))


def _letters(story: str) -> str:
    return re.sub(r"[^a-z]", "", story.lower())[:200]
