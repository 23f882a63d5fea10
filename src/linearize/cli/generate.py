"""The verbs `generate` and `chat`."""

from __future__ import annotations

from typing import Annotated

import typer

from linearize.cli.options import (
    Adapter,
    Device,
    DeviceMap,
    DType,
    MaxNewTokens,
    Model,
    Revision,
    Seed,
    Store,
    Temperature,
    Token,
    count,
    specified,
)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    draft: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A smaller model that drafts tokens (speculative decoding).")
    ] = None,
    prompt_lookup: Annotated[
        bool, typer.Option("--prompt-lookup", help="Draft tokens by looking them up in the text so far.")
    ] = False,
    draft_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="K|auto", help="Draft tokens per round; default: auto, which follows the acceptance rate."
        ),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print the statistics of speculative decoding on stderr.")
    ] = False,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Run torch.compile first: takes half a minute or more, pays for long texts."),
    ] = False,
    adapter: Adapter = None,
    store: Store = None,
    revision: Revision = None,
    token: Token = None,
    dtype: DType = None,
    device: Device = None,
    device_map: DeviceMap = None,
) -> None:
    """Continue a prompt."""
    from linearize.decoding.generate import generate_text

    chosen = specified(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, draft=draft, device=device)
    chosen |= specified(adapter=adapter, store=store, revision=revision, token=token, dtype=dtype)
    chosen |= specified(device_map=device_map)
    if draft_tokens is not None:
        chosen["draft_tokens"] = draft_tokens if draft_tokens == "auto" else count(draft_tokens)
    generate_text(model, prompt, prompt_lookup=prompt_lookup, stats=stats, compile=compile, **chosen)


def chat(
    model: Model,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    adapter: Adapter = None,
    store: Store = None,
    revision: Revision = None,
    token: Token = None,
    dtype: DType = None,
    device: Device = None,
    device_map: DeviceMap = None,
) -> None:
    """Chat with a model on the terminal."""
    from linearize.decoding.generate import chat as run_chat

    chosen = specified(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, device=device)
    chosen |= specified(adapter=adapter, store=store, revision=revision, token=token, dtype=dtype)
    run_chat(model, **chosen | specified(device_map=device_map))
