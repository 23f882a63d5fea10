"""What of a student and of vLLM's options the plugin runs, looked at before vLLM starts a worker or takes memory."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from linearize.errors import InputError
from linearize.modeling import LinearizeConfig
from linearize.serving.vllm.pages import PageLayout, page_layouts


class StudentChecks(VerifyAndUpdateConfig):
    """vLLM calls it with its whole config, in the first process."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Change nothing.

        Raises:
            InputError: an option, or a layer, that this plugin does not run; says which.
        """
        check_options(vllm_config)
        student_layouts(vllm_config)


def check_options(config: VllmConfig) -> None:
    """Refuse options of vLLM that the plugin does not run.

    Raises:
        InputError: such an option.
    """
    parallel = config.parallel_config
    refused = {
        "tensor or pipeline parallelism": parallel.tensor_parallel_size * parallel.pipeline_parallel_size > 1,
        "dual batch overlap": bool(getattr(parallel, "enable_dbo", False)),
        "speculative decoding": config.speculative_config is not None,
        "quantization": config.quant_config is not None,
        "LoRA adapters": config.lora_config is not None,
    }
    for option, is_set in refused.items():
        if is_set:
            raise InputError(f"vLLM with {option}: the plugin of linearize does not run it for students; leave it out")


def student_config(vllm_config: VllmConfig) -> LinearizeConfig:
    """The student's config among vLLM's.

    Raises:
        InputError: the config of something else.
    """
    config = vllm_config.model_config.hf_config
    if not isinstance(config, LinearizeConfig):
        raise InputError(f"{vllm_config.model_config.model} is a {config.model_type} model, not a student")
    return config


def student_layouts(vllm_config: VllmConfig) -> dict[int, PageLayout]:
    """The pages of the student's converted layers. Raises InputError as `page_layouts` does."""
    config = student_config(vllm_config)
    return page_layouts(config.mixers(), config.attention_shapes(), vllm_config.model_config.dtype)
