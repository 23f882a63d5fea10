"""A plugin with which vLLM serves students: `vllm serve STUDENT` and `vllm.LLM(STUDENT)` need no flag of ours.

Each converted layer keeps one page per sequence, of a size that does not depend on the text; kept softmax layers are
vLLM's own attention. Read in this order:

| file | holds |
|---|---|
| `__init__.py` | what the entry point `vllm.general_plugins` calls in each of vLLM's processes |
| `checks.py` | what of a student and of vLLM's options is refused, before anything starts |
| `model.py` | the model class that vLLM makes: a student whose attention goes through the layers below |
| `layers.py` | a mixer over pages, vLLM's attention for kept layers, and how transformers' modules call them |
| `backend.py` | how vLLM asks for a step's metadata |
| `steps.py` | which tokens of a step belong to which sequence |
| `pages.py` | a mixer's state as bytes of a page |
| `weights.py` | a student's checkpoint into the model |
"""

from __future__ import annotations

ARCHITECTURE = "LinearizedForCausalLM"


def register() -> None:
    """Make students known to vLLM and transformers; may be called more than once."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from linearize.serving.vllm.checks import StudentChecks  # imports `modeling`, which registers the config class

    MODELS_CONFIG_MAP[ARCHITECTURE] = StudentChecks
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "linearize.serving.vllm.model:ServedStudent")
