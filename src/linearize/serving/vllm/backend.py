"""How vLLM asks for the metadata of converted layers, which is a `Step`."""

from __future__ import annotations

from typing import ClassVar

from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend, LinearAttentionMetadataBuilder
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor

from linearize.serving.vllm.steps import Step


class StepBuilder(LinearAttentionMetadataBuilder):
    """Makes a `Step` from what vLLM says of a batch."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        """See `AttentionMetadataBuilder.build`."""
        common = common_attn_metadata
        page_S = mamba_get_block_table_tensor(
            common.block_table_tensor,
            common.seq_lens,
            self.kv_cache_spec,
            self.vllm_config.cache_config.mamba_cache_mode,
        )[:, 0].long()
        lengths = common.seq_lens_cpu_upper_bound  # exact without speculation, and known without waiting for a device
        lengths = common.seq_lens if lengths is None else lengths
        return Step.of(common.query_start_loc_cpu.tolist(), lengths.tolist(), page_S)


class StepBackend(LinearAttentionBackend):
    """What vLLM asks for the builder of a converted layer's metadata."""

    @staticmethod
    def get_name() -> str:
        """Its name in vLLM's log."""
        return "LINEARIZE"

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        """The builder."""
        return StepBuilder
