"""Whether a model keeps the documents of a packed row apart: some families ignore positions that restart.

Their attention masks, or their own counters of positions, run on over the whole row (OPT, BioGPT, BART's decoder), so
that every document after the first is computed as if it went on. Rows for such a model hold one document each.

Letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

FIRST, SECOND = 7, 6  # tokens of the two documents
RIGHT = 0.1  # of the difference that the first document makes where it is seen: anything less is rounding

Run = Callable[[Mapping[str, Tensor]], Tensor]


def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether a causal LM gives two documents of one row what it gives each alone, found by running a few tokens."""

    def run(batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = model(**{name: x.to(model.device) for name, x in batch.items()}, use_cache=False).logits
        return logits

    was_training = model.training
    try:
        model.eval()
        return keeps_apart(run, model.config.get_text_config().vocab_size)
    finally:
        model.train(was_training)


@torch.no_grad()
def keeps_apart(run: Run, vocabulary: int) -> bool:
    """The same of a function from `input_ids` and `position_ids` `[1, T]` to what it computes of them, `[1, T, .]`.

    The second document's outputs are compared with those that it has alone; how far off they are is measured by what
    they would be as the continuation of the first.
    """
    ids = (torch.arange(FIRST + SECOND) * 7 + 5)[None] % vocabulary
    running = torch.arange(FIRST + SECOND)[None]
    restarting = torch.cat([running[:, :FIRST], running[:, :SECOND]], dim=1)
    packed, continued = (
        run({"input_ids": ids, "position_ids": positions})[:, FIRST:].double() for positions in (restarting, running)
    )
    alone = run({"input_ids": ids[:, FIRST:], "position_ids": running[:, :SECOND]}).double()
    return bool((packed - alone).norm() <= RIGHT * (continued - alone).norm())
