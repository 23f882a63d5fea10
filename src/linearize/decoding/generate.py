"""Continue a prompt and hold a conversation, with students and teachers alike: by transformers' own `generate`, or by
`speculate` where there is a draft."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from linearize.decoding.compiled import StepLoop, compiled_step
from linearize.decoding.loading import load_any, pad_token
from linearize.decoding.speculative import Drafter, LookupDrafter, ModelDrafter, share_equal_weights, speculate
from linearize.decoding.speculative.draft_length import DraftTokens, check_draft_tokens
from linearize.decoding.speculative.drafters import check_tokenizers
from linearize.errors import InputError
from linearize.storage.files import well_formed


def generate_text(
    model_path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
    stream: bool = True,
    prompt_lookup: bool = False,
    draft: str | Path | None = None,
    draft_tokens: DraftTokens = "auto",
    stats: bool = False,
    compile: bool | str = False,
    device: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    adapter: str | Path | None = None,
    store: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | str | None = None,
) -> str:
    """Continue a prompt with a student or any causal LM, and return prompt and continuation.

    `stream` writes the text to stdout as it comes; temperature 0 is greedy. `prompt_lookup` drafts tokens from
    repetitions in the text, `draft` with a second, smaller model that has the same tokenizer (it shares the memory of
    weights that are equal), `draft_tokens` at a time; greedy text stays the same, and so does the distribution that
    tokens are drawn from. `stats` prints to stderr how many draft tokens were accepted. `compile` (True, or the name of
    a backend of `torch.compile`) decodes by a compiled step: half a minute or more to begin with, for long texts.
    `revision`, `token`, `dtype`, `device_map`: see `linearize.load`; `revision` is of the model, not of the draft.
    Raises InputError for a setting out of range, an empty prompt without a BOS token, a path that is not a model, or a
    draft that does not fit this model.
    """
    _check(max_new_tokens, temperature)
    _check_draft(prompt_lookup, draft, draft_tokens, stats)
    _check_compile(compile, prompt_lookup, draft)
    place: dict[str, Any] = {"device": device, "device_map": device_map, "token": token, "dtype": dtype}
    model, tokenizer = load_any(model_path, adapter=adapter, store=store, revision=revision, **place)
    draft_model = None
    if draft is not None:
        draft_model, draft_tokenizer = load_any(draft, **place)
        check_tokenizers(tokenizer, draft_tokenizer, str(model_path), str(draft))
        share_equal_weights(draft_model, model)
    return continue_text(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True) if stream else None,
        prompt_lookup=prompt_lookup,
        draft=draft_model,
        draft_tokens=draft_tokens,
        stats=stats,
        compile=compile,
    )


def continue_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
    streamer: BaseStreamer | None = None,
    prompt_lookup: bool = False,
    draft: PreTrainedModel | None = None,
    draft_tokens: DraftTokens = "auto",
    stats: bool = False,
    compile: bool | str = False,
) -> str:
    """`generate_text` for models in memory: prompt and continuation as text, special tokens left out.

    `draft`: a model with the same tokenizer. `compile`: what was compiled for a model serves its later texts too.
    """
    _check(max_new_tokens, temperature)
    _check_draft(prompt_lookup, draft, draft_tokens, stats)
    _check_compile(compile, prompt_lookup, draft)
    ids = list(tokenizer(well_formed(prompt))["input_ids"]) or [tokenizer.bos_token_id]
    if ids == [None]:
        raise InputError("the prompt is empty and this tokenizer has no BOS token to start from: give some text")
    settings = _settings(tokenizer, max_new_tokens, temperature)
    drafter = LookupDrafter() if prompt_lookup else None if draft is None else ModelDrafter(draft)
    if drafter is None:
        backend = "inductor" if compile is True else compile or None
        out = _generate(model, ids, settings, seed, streamer, backend=backend)
    else:
        out = _speculate(model, drafter, ids, settings, seed, streamer, draft_tokens=draft_tokens, stats=stats)
    return str(tokenizer.decode(out, skip_special_tokens=True))


def _check(max_new_tokens: int, temperature: float) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature}: it must be 0 (greedy) or more")


def _check_draft(prompt_lookup: bool, draft: object, draft_tokens: DraftTokens, stats: bool) -> None:
    if prompt_lookup and draft is not None:
        raise InputError("prompt lookup and a draft model were both given: each drafts tokens, choose one")
    check_draft_tokens(draft_tokens)
    if not prompt_lookup and draft is None and (draft_tokens != "auto" or stats):
        option = "stats" if stats else f"draft_tokens {draft_tokens}"
        raise InputError(f"{option} without a draft: give a draft model or prompt lookup too")


def _check_compile(compile: bool | str, prompt_lookup: bool, draft: object) -> None:
    if compile and (prompt_lookup or draft is not None):
        other = "prompt lookup" if prompt_lookup else "a draft model"
        raise InputError(f"compile and {other} were both given: a compiled step does not speculate, choose one")


class GenerateSettings(TypedDict):
    """Keywords of transformers' `generate`."""

    max_new_tokens: int
    pad_token_id: int
    do_sample: bool
    temperature: NotRequired[float]


def _settings(tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float) -> GenerateSettings:
    """Keywords for `generate`; with sampling, top-k and top-p are those of the model's own generation config."""
    settings: GenerateSettings = {
        "max_new_tokens": max_new_tokens,
        "pad_token_id": pad_token(tokenizer),
        "do_sample": temperature > 0,
    }
    if temperature > 0:
        settings["temperature"] = temperature
    return settings


def _speculate(
    model: PreTrainedModel,
    drafter: Drafter,
    ids: list[int],
    settings: GenerateSettings,
    seed: int,
    streamer: BaseStreamer | None,
    *,
    draft_tokens: DraftTokens,
    stats: bool,
) -> list[int]:
    """Return the tokens of prompt and continuation, decoded with a draft."""
    result = speculate(
        model,
        drafter,
        torch.tensor([ids], device=model.device),
        max_new_tokens=settings["max_new_tokens"],
        draft_tokens=draft_tokens,
        generation_config=GenerationConfig(**settings),
        seed=seed,
        streamer=streamer,
    )
    if stats:
        print(result.stats.line(), file=sys.stderr)
    return ids + result.tokens[0]


@torch.inference_mode()
def _generate(
    model: PreTrainedModel,
    ids: list[int],
    settings: GenerateSettings,
    seed: int,
    streamer: BaseStreamer | None,
    *,
    backend: str | None = None,
) -> list[int]:
    """Return the tokens of prompt and continuation; the caller's random numbers are left as they were.

    `backend`: of `torch.compile` (None: not compiled).
    """
    input_ids = torch.tensor([ids], device=model.device)
    loop: dict[str, object] = {"streamer": streamer}
    if backend is not None:
        step = compiled_step(model, rows=1, tokens=len(ids) + settings["max_new_tokens"], backend=backend)
        loop = loop if step is None else {"custom_generate": StepLoop(step, streamer)}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        generate: Any = model.generate
        out = generate(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **loop, **settings)
    tokens: list[int] = out[0].tolist()
    return tokens


def chat(
    model_path: str | Path,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.7,
    seed: int = 0,
    device: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    adapter: str | Path | None = None,
    store: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | str | None = None,
    read: Callable[[str], str] = input,
) -> None:
    """Talk with a model on the terminal until Ctrl-C or the end of input.

    With a chat template each line is a user's turn; without one the conversation is one text that the model continues.
    `read` asks for a line, as `input` does. The model is loaded as by `linearize.load`.
    """
    _check(max_new_tokens, temperature)
    model, tokenizer = load_any(
        model_path, adapter=adapter, store=store, revision=revision, token=token, dtype=dtype, device=device,
        device_map=device_map,
    )  # fmt: skip
    print(_greeting(tokenizer))
    history: list[int] = []
    messages: list[dict[str, str]] = []
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings = _settings(tokenizer, max_new_tokens, temperature)
    try:
        while True:
            line = well_formed(read("> "))
            if not line.strip():
                continue
            ids = _turn(tokenizer, line, history, messages)
            history = _generate(model, ids, settings, seed, streamer)
            answer = str(tokenizer.decode(history[len(ids) :], skip_special_tokens=True))
            messages.append({"role": "assistant", "content": answer})
            seed += 1
    except (EOFError, KeyboardInterrupt):
        print()


def _greeting(tokenizer: PreTrainedTokenizerBase) -> str:
    how = "Type a message" if tokenizer.chat_template else "No chat template: the model continues the text you type"
    return f"{how}. Ctrl-C or Ctrl-D leaves."


def _turn(
    tokenizer: PreTrainedTokenizerBase, line: str, history: list[int], messages: list[dict[str, str]]
) -> list[int]:
    """The whole input for the answer to `line`; the line joins the messages."""
    messages.append({"role": "user", "content": line})
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not history:
        return list(tokenizer(line)["input_ids"])
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    while history and history[-1] in ends:
        history = history[:-1]
    return history + list(tokenizer("\n" + line, add_special_tokens=False)["input_ids"])
