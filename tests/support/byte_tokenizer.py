"""A tokenizer with one token a byte, so that ids can be counted by hand, and a chat template."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIZE = 258  # tokens: the two special ones and 256 bytes
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def byte_tokenizer(*, chat: str | None = None, **special: str | None) -> PreTrainedTokenizerFast:
    """BOS 0, EOS 1, no padding token; `chat` is its template."""
    vocab = {symbol: index + 2 for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    base = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, **vocab}, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    base.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, **{k: v for k, v in names.items() if v is not None})
    tokenizer.chat_template = chat
    return tokenizer
