"""A model as lm-eval's `HFLM`: the same requests, batches and answers, with progress and answers kept, and its batch.

What it adds changes no number: a prompt that several choices share is tokenized once (and once for all models),
requests answered before an interruption are not asked again.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from linearize.evaluation.context import EvalModel
from linearize.evaluation.harness.answers import Answers
from linearize.evaluation.harness.definitions import quiet

Pair = tuple[list[int], list[int]]


class TooLongError(Exception):
    """An answer of a task has more tokens than a row, which lm-eval does not take; `tokens`: of the longest."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"an answer has {tokens} tokens")
        self.tokens = tokens


TOKENIZE_AT_ONCE = 512  # texts
CPU_BYTES = 1 << 29  # for the logits of a batch and what is computed from them
CPU_ROWS = 16  # more rows bring nothing there: they only add padding
LONGEST = 4096  # tokens: prompts of tasks are not longer, even where the model's rows could be


@dataclass
class Pairs:
    """Tokens of contexts and continuations by their texts; all models have one tokenizer."""

    found: dict[tuple[str, str], Pair] = field(default_factory=dict)

    def add(self, texts: Sequence[tuple[str, str]], encode: Callable[[list[str]], list[list[int]]]) -> None:
        """Tokenize those not seen yet as lm-eval does: the continuation is what the whole has beyond the context."""
        new = [pair for pair in dict.fromkeys(texts) if pair not in self.found and pair[0]]
        ids: dict[int, int] = {}  # one object for each token id: contexts are long and many

        def shared(strings: list[str]) -> list[list[int]]:
            rows = []
            for start in range(0, len(strings), TOKENIZE_AT_ONCE):
                for row in encode(strings[start : start + TOKENIZE_AT_ONCE]):
                    rows.append([ids.setdefault(i, i) for i in row])
            return rows

        contexts = list(dict.fromkeys(context.rstrip() for context, _ in new))
        encoded = dict(zip(contexts, shared(contexts), strict=True))
        for start in range(0, len(new), TOKENIZE_AT_ONCE):
            some = new[start : start + TOKENIZE_AT_ONCE]
            for (context, continuation), whole in zip(some, shared([a + b for a, b in some]), strict=True):
                head = encoded[context.rstrip()]
                self.found[context, continuation] = head, whole[len(head) :]


def harness_model(eval_model: EvalModel, *, batch: int, max_length: int, pairs: Pairs) -> Any:
    """The model as an lm-eval model that can be given `answers` (an `Answers`) before each task."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import has_bos_prefix

    class Harnessed(HFLM):
        answers: Answers

        def tokens(self, texts: list[str]) -> list[list[int]]:
            """What `tok_encode` gives for each, in one call."""
            start = self.tokenizer.decode(self.prefix_token_id)
            if any(has_bos_prefix(text, start) for text in texts):
                return [self.tok_encode(text) for text in texts]
            rows: list[list[int]] = self.tokenizer(texts)["input_ids"]
            return rows

        def _encode_pair(self, context: str, continuation: str) -> Pair:
            pairs.add([(context, continuation)], self.tokens)
            return pairs.found[context, continuation]

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            left = self._unanswered("loglikelihood", requests)
            pairs.add([requests[i].args for i in left], self.tokens)
            longest = max((len(pairs.found[r.args][1]) for r in requests if r.args in pairs.found), default=0)
            if longest > self.max_length:
                raise TooLongError(longest)
            new = super().loglikelihood([requests[i] for i in left], disable_tqdm=True) if left else []
            return [tuple(answer) for answer in self._all("loglikelihood", requests, left, new)]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            left = self._unanswered("loglikelihood_rolling", requests)
            new = super().loglikelihood_rolling([requests[i] for i in left], disable_tqdm=True) if left else []
            return self._all("loglikelihood_rolling", requests, left, new)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            left = self._unanswered("generate_until", requests)
            new = super().generate_until([requests[i] for i in left], disable_tqdm=True) if left else []
            return self._all("generate_until", requests, left, new)

        def _unanswered(self, kind: str, requests: list[Any]) -> list[int]:
            """Positions of requests that must be asked: sampled ones always."""
            self.set_cache_hook(self.answers)
            left = [i for i, r in enumerate(requests) if _sampled(r) or self.answers.find(kind, r.args) is None]
            self.answers.done, self.answers.asked = len(requests) - len(left), len(requests)
            return left

        def _all(self, kind: str, requests: list[Any], left: list[int], new: list[Any]) -> list[Any]:
            fresh = dict(zip(left, new, strict=True))
            return [fresh[i] if i in fresh else self.answers.find(kind, r.args) for i, r in enumerate(requests)]

    with quiet():
        return Harnessed(
            pretrained=eval_model.model,
            tokenizer=copy.deepcopy(eval_model.tokenizer),  # lm-eval gives it a padding token
            batch_size=batch,
            max_length=max_length,
        )


def _sampled(request: Any) -> bool:
    given = request.args[1] if len(request.args) > 1 else None
    return isinstance(given, dict) and bool(given.get("do_sample", False))


def choose_batch(eval_models: tuple[EvalModel, ...], max_length: int) -> int:
    """Rows of `max_length` tokens (4,096 at most) that every model can take; the same number for all."""
    return min(_batch(eval_model, min(max_length, LONGEST)) for eval_model in eval_models)


def _batch(eval_model: EvalModel, max_length: int) -> int:
    if eval_model.model.device.type != "cpu":
        return _by_trial(eval_model, max_length)
    config: Any = eval_model.model.config.get_text_config()
    row = 4 * max_length * (3 * config.vocab_size + 16 * config.hidden_size)
    rows = max(1, min(CPU_ROWS, CPU_BYTES // row))
    return 1 << (rows.bit_length() - 1)


def _by_trial(eval_model: EvalModel, max_length: int) -> int:
    """lm-eval's own search for the largest batch."""
    model = harness_model(eval_model, batch=1, max_length=max_length, pairs=Pairs())
    with contextlib.redirect_stdout(io.StringIO()):
        return int(model._detect_batch_size())
