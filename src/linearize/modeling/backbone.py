"""A student as transformers' `AutoModel` gives it: hidden states instead of logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache

from linearize.modeling.cache_argument import given_cache, with_cache
from linearize.modeling.student import LinearizedForCausalLM


class LinearizedModel(LinearizedForCausalLM):
    """The whole student, its head included (so that saving it loses nothing), whose forward ends before the head."""

    @classmethod
    def can_generate(cls) -> bool:
        """No: there are no logits."""
        return False

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the teacher's own backbone; returns its output (`last_hidden_state: [B, T, M]`, and the cache).

        Arguments as those of `LinearizedForCausalLM.forward`. Raises InputError: an argument that nothing would read.
        """
        backbone = self.base_model
        return backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **with_cache(backbone, given_cache(cache, past_key_values)),
            **kwargs,
        )
