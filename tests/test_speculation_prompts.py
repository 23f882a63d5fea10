"""Sixty real prompts: speculative greedy output is plain greedy output, for every mixer, ratio and draft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCABULARY, mixer, student_of, tiny
from speculation_cases import both_ways, endless, near
from torch import Tensor

from linearize.decoding.speculative import LookupDrafter, speculate
from linearize.mixers import MIXERS

pytestmark = pytest.mark.slow

FILES = ("alpaca", "gsm8k", "humaneval", "mt_bench", "qa", "sum")
EACH, LONGEST, NEW = 10, 41, 11
RATIOS: dict[str, Any] = {
    "all": lambda m: [m, m, m],
    "a third kept": lambda m: [m, None, m],
    "most kept": lambda m: [None, m, None],
}


@pytest.fixture(scope="module")
def prompts(shared_dir: Path) -> list[Tensor]:
    """The prompts' bytes as tokens of the tiny vocabulary; two batches, padded on the left, and their masks."""
    folder = shared_dir / "data" / "eval" / "spec_decoding"
    files = [(folder / f"{name}.jsonl").read_text().split("\n")[:EACH] for name in FILES]
    texts = [json.loads(line)["turns"][0] for lines in files for line in lines]
    assert len(texts) == 60
    rows = [[3 + byte % (VOCABULARY - 3) for byte in text.encode()][: LONGEST - i % 7] for i, text in enumerate(texts)]
    return [torch.tensor([[0] * (LONGEST - len(row)) + row for row in some]) for some in (rows[::2], rows[1::2])]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", sorted(MIXERS))
def test_sixty_prompts(prompts: list[Tensor], name: str, ratio: str) -> None:
    teacher = endless(tiny("llama", attention="sdpa"))
    target = endless(student_of(teacher, RATIOS[ratio](mixer(name))))
    drafts: dict[str, tuple[Any, Any]] = {
        "model": (target, near(target)),
        "the text itself": (target, LookupDrafter()),
        "the student for its teacher": (teacher, target),
    }
    for how, (model, draft) in drafts.items():
        kept = wrong = 0
        for ids in prompts:
            mask = (ids > 0).long()
            plain = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
            result = speculate(model, draft, ids, mask, max_new_tokens=NEW, draft_tokens=3)
            assert result.tokens == plain[:, ids.shape[1] :].tolist(), how
            kept, wrong = kept + result.stats.accepted, wrong + result.stats.drafted - result.stats.accepted
            if how == "model":
                both_ways(result.stats)
        assert wrong > 0, how
        assert kept > 0, how
