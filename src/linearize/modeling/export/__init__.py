"""Students written for programs without linearize: as architectures that engines know, or with their own code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from linearize.errors import InputError, unknown
from linearize.modeling import LinearizedForCausalLM, load
from linearize.modeling.export import granite_hybrid, mlx, qwen3_5, remote_code
from linearize.modeling.export.common import Source, listed, logit_difference, name_of
from linearize.modeling.io.hub import local_copy
from linearize.registry import Table
from linearize.storage.atomic import atomic_folder, check_free
from linearize.storage.files import check_apart, expand_home
from linearize.version import __version__

__all__ = ["EXPORTS", "Export", "export_student", "register_export"]

SCRIPTS = "It's 12345 o'clock,\n\n  हिन्दी में, ภาษาไทย, العَرَبِيَّة, 中文 1.5x -> é\u0301!"
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
GRANITE_VERSION = (
    "**transformers 5.23 or newer.** The norms of its Mamba-2 layers are per group; transformers before 5.23 and "
    "mlx-lm (0.32) normalise over all groups at once and write other text, without an error."
)
GRANITE_LLAMA = (
    "llama.cpp (October 2026) does not load this folder: its Mamba-2 layers are twice as wide as the model "
    "(`2 * n_embd == d_inner`) and its softmax layers as wide as the model, and both are of one width here."
)
QWEN_LLAMA = "llama.cpp: convert with `--no-mtp`, since the folder has no layers for multi-token prediction."
QWEN_MLX = (
    "mlx-lm takes the kinds of layers from `full_attention_interval`, which cannot say which layers keep softmax here: "
    "do not use it."
)
GRANITE_BIAS = (
    "The Mamba-2 layers have biases in their projections, and transformers' layer lets the bias of padding into its "
    "convolution: give it texts one by one or of one length, not batches with padding on the left."
)
MLX = """```bash
pip install mlx-lm  # on a Mac, or "mlx[cpu]" beside it
mlx_lm.generate --model {folder} --trust-remote-code --prompt "Once upon a time"
mlx_lm.server --model {folder} --trust-remote-code
```

The folder carries the code of its layers, `linearized_mlx.py`, which mlx-lm (0.32 or newer) runs with
`--trust-remote-code`. Window + linear layers hold a state of constant size."""
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


@dataclass(frozen=True, kw_only=True)
class Export:
    """One target: `misfit(source)` says why a student cannot be written (None: it can), `write(student, source,
    folder)` writes it. `native`: an architecture of transformers; otherwise the folder carries code."""

    misfit: Callable[[Source], str | None]
    write: Callable[[LinearizedForCausalLM, Source, Path], None]
    native: bool


def _misuse(name: str, entry: object) -> str | None:
    return None if isinstance(entry, Export) else f"it is {entry!r}, and an `Export` is needed"


_OWN = {
    "granite-hybrid": Export(misfit=granite_hybrid.misfit, write=granite_hybrid.write, native=True),
    "qwen3.5": Export(misfit=qwen3_5.misfit, write=qwen3_5.write, native=True),
    "hf": Export(misfit=remote_code.misfit, write=remote_code.write, native=False),
    "mlx": Export(misfit=mlx.misfit, write=mlx.write, native=False),
}
EXPORTS: Table[Export] = Table("export target", "linearize.exports", _OWN, _misuse)


def register_export(name: str, export: Export) -> None:
    """Let `linearize export --to NAME` write a form of another package; the entry-point group is `linearize.exports`.

    Raises:
        InputError: a name that is taken, or an entry that is not an `Export`.
    """
    EXPORTS.register(name, export, package=(export.write.__module__ or "__main__").partition(".")[0])


def export_student(
    student_or_path: LinearizedForCausalLM | str | Path,
    to: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Write a student as `to`, one of `EXPORTS`; returns the folder, which loads without linearize.

    A native folder is loaded again and its logits compared with the student's before it gets its name. `tokenizer`:
    None: that of the student's folder. `revision`, `token`: of a Hub name.

    Raises:
        InputError: an unknown target, an output folder that exists, no student, or a student that does not fit (with
            the reason and the nearest target that takes it).
    """
    if to not in EXPORTS:
        raise unknown("export target", to, EXPORTS)
    out = Path(expand_home(out)).resolve()
    check_free(out, overwrite)
    student = student_or_path
    if not isinstance(student, LinearizedForCausalLM):
        if not isinstance(student, (str, Path)):
            raise InputError(f"a {type(student).__name__} given: give a student, in memory or by its folder")
        student = expand_home(student)
        check_apart(out, student)
        place = local_copy(student, revision=revision, token=token).path
        tokenizer = tokenizer or _tokenizer(place)
        student = load(place)
    source = Source.of(student)
    if reason := EXPORTS[to].misfit(source):
        other = nearest(source)
        raise InputError(f"{reason}: " + (f"use --to {other}" if other else "no target takes this student"))
    with atomic_folder(out, overwrite) as folder:
        EXPORTS[to].write(student, source, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        difference = logit_difference(student, folder) if EXPORTS[to].native else None
        same = tokenizer is None or same_tokens(tokenizer, folder)
        (folder / "README.md").write_text(readme(to, source, out.name, difference, same), "utf-8")
    return out


def nearest(source: Source) -> str | None:
    """The first own target that takes a student, None where there is none; native ones come first."""
    return next((name for name, export in EXPORTS.own.items() if export.misfit(source) is None), None)


def same_tokens(tokenizer: PreTrainedTokenizerBase, folder: Path) -> bool:
    """Whether `AutoTokenizer` reads the folder's tokenizer as the one given: for some architectures transformers puts
    a splitting rule of its own in the place of the one that was saved."""
    from transformers import AutoTokenizer

    try:
        read = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError):
        return False
    return bool(read(SCRIPTS)["input_ids"] == tokenizer(SCRIPTS)["input_ids"])


def _tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a student, or None where there is none."""
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*token*")):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
        return tokenizer
    except (OSError, ValueError):
        return None


def readme(to: str, source: Source, folder: str, difference: float | None, same_tokens: bool) -> str:
    """Return the README.md of an exported folder: how to load it, where it runs, what was checked.

    `difference`: of the logits, as checked; None: not checked. `same_tokens`: whether `AutoTokenizer` reads the
    folder's tokenizer as the student's.
    """
    parts = [f"# {folder}", f"Written by linearize {__version__} (`--to {to}`).", _layers(source)]
    if to == "mlx":
        parts.append(MLX.format(folder=folder))
    else:
        parts.append(LOAD.format(folder=folder, options="" if to != "hf" else ", trust_remote_code=True"))
    if to == "hf":
        parts.append(OWN_CODE)
    elif to != "mlx":
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
        spread = "full_attention_interval" in qwen3_5.config_fields(source)
        return [NATIVE.format(name="Qwen3.5 (text)"), QWEN_LLAMA, *([] if spread else [QWEN_MLX])]
    shape, notes = source.shapes[0], [NATIVE.format(name="GraniteMoeHybrid")]
    if source.holding("mamba2"):
        notes.append(GRANITE_VERSION)
        notes.append(GRANITE_LLAMA)
    if source.kept and shape.num_heads * shape.head_dim != source.config.hidden_size:
        notes.append(GRANITE_HEADS)
    if 0 < len(source.kept) < len(source.plan):
        notes.append(GRANITE_ROPE)
    if any("in_proj.bias" in source.mixer(i) for i in source.holding("mamba2")):
        notes.append(GRANITE_BIAS)
    return notes
