"""The README.md of an exported folder: how to load it, where it runs, what was checked."""

from __future__ import annotations

from linearize.modeling.export.common import Source, listed, name_of
from linearize.version import __version__

LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}"{options})
tokenizer = AutoTokenizer.from_pretrained("{folder}"{options})
```"""
NATIVE = (
    "The architecture is {name}: transformers loads it unchanged, and vLLM and SGLang have it too. Only transformers "
    "was run with this folder."
)
GRANITE_HEADS = (
    "vLLM and SGLang take the head size of softmax layers to be width / heads, which is not so here: use transformers."
)
GRANITE_ROPE = (
    "llama.cpp: its converter turns rotary positions off in Granite hybrids, so the softmax layers of this model would "
    "be wrong there (as its source read in 2026; not run)."
)
GRANITE_BIAS = (
    "The Mamba-2 layers have biases in their projections, and transformers' layer lets the bias of padding into its "
    "convolution: give it texts one by one or of one length, not batches with padding on the left."
)
OWN_CODE = (
    "The folder carries the code of its layers (`modeling_linearized.py` and the files beside it), which "
    "`trust_remote_code=True` runs. It needs torch, transformers 5, safetensors and pydantic, not linearize. "
    "`AutoModel` gives the hidden states. Engines other than transformers do not run it."
)
TOKENIZER = (
    "**Tokenizer.** For this architecture `AutoTokenizer` puts a splitting rule of its own in the place of the one in "
    "`tokenizer.json`, and tokenizes some text otherwise than the model was trained with. Load it with "
    '`PreTrainedTokenizerFast.from_pretrained("{folder}")`.'
)


def readme(to: str, source: Source, folder: str, difference: float | None, same_tokens: bool) -> str:
    """The text. `difference`: of the logits, as checked; None: not checked. `same_tokens`: whether `AutoTokenizer`
    reads the folder's tokenizer as the student's."""
    parts = [f"# {folder}", f"Written by linearize {__version__} (`--to {to}`).", _layers(source)]
    parts.append(LOAD.format(folder=folder, options="" if to != "hf" else ", trust_remote_code=True"))
    if to == "hf":
        parts.append(OWN_CODE)
    else:
        parts += _native(to, source)
    if not same_tokens:
        parts.append(TOKENIZER.format(folder=folder))
    if difference is not None:
        parts.append(
            f"Checked when it was written: the logits of 24 random tokens differ from the student's by at most "
            f"{difference:.1e} ({str(source.dtype).removeprefix('torch.')})."
        )
    return "\n\n".join(parts) + "\n"


def _layers(source: Source) -> str:
    names = {name_of(mixer) for mixer in source.plan if mixer is not None}
    lines = [f"- {name}: {listed(source.holding(name))}" for name in sorted(names)]
    if source.kept:
        lines.append(f"- softmax attention: {listed(source.kept)}")
    return f"A {source.family} body with\n\n" + "\n".join(lines)


def _native(to: str, source: Source) -> list[str]:
    if to == "qwen3.5":
        return [NATIVE.format(name="Qwen3.5 (text)")]
    shape, notes = source.shapes[0], [NATIVE.format(name="GraniteMoeHybrid")]
    if source.kept and shape.num_heads * shape.head_dim != source.config.hidden_size:
        notes.append(GRANITE_HEADS)
    if 0 < len(source.kept) < len(source.plan):
        notes.append(GRANITE_ROPE)
    if any("in_proj.bias" in source.mixer(i) for i in source.holding("mamba2")):
        notes.append(GRANITE_BIAS)
    return notes
