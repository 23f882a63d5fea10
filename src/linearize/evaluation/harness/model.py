"""A model as lm-eval's `HFLM`, with tokens of shared prompts made once; and how many rows it can take at a time.

What is added to `HFLM` changes no number.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from linearize.evaluation.context import EvalModel
from linearize.evaluation.harness.isolation import isolated

Pair = tuple[list[int], list[int]]
TOKENIZE_AT_ONCE = 512  # texts
CPU_BYTES = 1 << 29  # for the logits of a batch and what is computed from them
CPU_ROWS = 16  # more rows bring nothing there: they only add padding
LONGEST = 4096  # tokens: prompts of tasks are not longer, even where the model's rows could be


class TooLongError(Exception):
    """An answer of a task has more tokens than a row, which lm-eval does not take; `tokens`: of the longest."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"an answer has {tokens} tokens")
        self.tokens = tokens


@dataclass
class PairTokens:
    """Tokens of contexts and continuations by their texts, for all models of an evaluation: they share a tokenizer."""

    pairs: dict[tuple[str, str], Pair] = field(default_factory=dict)

    def add(self, texts: Sequence[tuple[str, str]], encode: Callable[[list[str]], list[list[int]]]) -> None:
        """Tokenize new pairs as lm-eval does: the continuation is what the whole text has beyond the context."""
        new = [pair for pair in dict.fromkeys(texts) if pair not in self.pairs and pair[0]]
        shared: dict[int, int] = {}  # one object for each token id: contexts are long and many

        def rows(strings: list[str]) -> list[list[int]]:
            starts = range(0, len(strings), TOKENIZE_AT_ONCE)
            encoded = (row for start in starts for row in encode(strings[start : start + TOKENIZE_AT_ONCE]))
            return [[shared.setdefault(token, token) for token in row] for row in encoded]

        contexts = list(dict.fromkeys(context.rstrip() for context, _ in new))
        heads = dict(zip(contexts, rows(contexts), strict=True))
        for start in range(0, len(new), TOKENIZE_AT_ONCE):
            some = new[start : start + TOKENIZE_AT_ONCE]
            for pair, whole in zip(some, rows([context + continuation for context, continuation in some]), strict=True):
                head = heads[pair[0].rstrip()]
                self.pairs[pair] = head, whole[len(head) :]


def harness_model(eval_model: EvalModel, *, batch: int, max_length: int, tokens: PairTokens) -> Any:
    """Return the model as an lm-eval model. It raises TooLongError for an answer longer than `max_length` tokens."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import has_bos_prefix

    class HarnessModel(HFLM):
        def encode_all(self, texts: list[str]) -> list[list[int]]:
            """What `tok_encode` returns for each, in one call."""
            start = self.tokenizer.decode(self.prefix_token_id)
            if any(has_bos_prefix(text, start) for text in texts):
                return [self.tok_encode(text) for text in texts]
            rows: list[list[int]] = self.tokenizer(texts)["input_ids"]
            return rows

        def _encode_pair(self, context: str, continuation: str) -> Pair:
            tokens.add([(context, continuation)], self.encode_all)
            return tokens.pairs[context, continuation]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            tokens.add([request.args for request in requests], self.encode_all)
            answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            return answers

        def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
            longest = max((len(continuation) for _, _, continuation in requests), default=0)
            if longest > self.max_length:
                raise TooLongError(longest)
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **options)
            return answers

    with isolated():
        return HarnessModel(
            pretrained=eval_model.model,
            tokenizer=copy.deepcopy(eval_model.tokenizer),  # lm-eval gives it a padding token
            batch_size=batch,
            max_length=max_length,
        )


def longest_row(eval_models: Sequence[EvalModel]) -> int:
    """Tokens that every model can take, found as lm-eval does for a model alone."""
    from lm_eval.models.utils import resolve_max_length

    return int(min(resolve_max_length(c.model.config, c.tokenizer, default=2048) for c in eval_models))


def choose_batch(eval_models: Sequence[EvalModel], max_length: int) -> int:
    """Rows of `max_length` tokens (4,096 at most) that every model can take; the same number for all."""
    return min(_batch(eval_model, min(max_length, LONGEST)) for eval_model in eval_models)


def _batch(eval_model: EvalModel, max_length: int) -> int:
    if eval_model.model.device.type != "cpu":  # lm-eval's own search for the largest batch
        model = harness_model(eval_model, batch=1, max_length=max_length, tokens=PairTokens())
        with contextlib.redirect_stdout(io.StringIO()):
            return int(model._detect_batch_size())
    config: Any = eval_model.model.config.get_text_config()
    row = 4 * max_length * (3 * config.vocab_size + 16 * config.hidden_size)
    rows = max(1, min(CPU_ROWS, CPU_BYTES // row))
    return 1 << (rows.bit_length() - 1)
