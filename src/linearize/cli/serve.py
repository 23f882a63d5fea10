"""The verb `serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from linearize.cli.options import (
    Adapter,
    Device,
    DeviceMap,
    DType,
    Model,
    Revision,
    Store,
    Token,
    count,
    number,
    size,
    specified,
)

EMBEDDED, VLLM = "embedded", "vllm"
Host = Annotated[
    str | None, typer.Option(help="Address to listen at; default: 127.0.0.1, which only this machine reaches.")
]
Timeout = Annotated[
    float | None, typer.Option(metavar="SECONDS", parser=number, help="Time for a request; default: 600.")
]
Grace = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", parser=number, help="Time for answers to end after a signal; default: 30."),
]


def _limit(value: str) -> int:
    """A size in bytes, or 0."""
    return 0 if value.strip() == "0" else size(value)


def serve(
    model: Model,
    host: Host = None,
    port: Annotated[int | None, typer.Option(help="Port; default: 8000; 0: any that is free.")] = None,
    engine: Annotated[
        str, typer.Option(metavar="embedded|vllm", help="What runs the model; vllm must be installed.")
    ] = EMBEDDED,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Key that clients must send; default: $LINEARIZE_API_KEY.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; default: the name of its folder.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(metavar="N", parser=count, help="Answers decoded together; default: 8.")
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(metavar="SIZE", parser=size, help="Memory for their states; default: half of what is free."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(metavar="N", parser=count, help="Tokens of prompt and answer; default: the model's own limit."),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", metavar="N", parser=count, help="Tokens of an answer; default: the context."),
    ] = None,
    prefill_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", parser=count, help="Prompt tokens read between two tokens of answers; default: 256."),
    ] = None,
    queue: Annotated[
        int | None, typer.Option(metavar="N", parser=count, help="Prompts that may wait; default: 256.")
    ] = None,
    max_body: Annotated[
        int | None, typer.Option(metavar="SIZE", parser=size, help="Largest request; default: 16MiB.")
    ] = None,
    timeout: Timeout = None,
    grace: Grace = None,
    state_memory: Annotated[
        int | None,
        typer.Option(metavar="SIZE", parser=_limit, help="Memory for states of conversations; default: 1GB; 0: none."),
    ] = None,
    state_disk: Annotated[
        int | None,
        typer.Option(metavar="SIZE", parser=_limit, help="Disk space for them; default: 4GB; 0: none."),
    ] = None,
    state_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where they are; default: the user's cache folder.")
    ] = None,
    adapter: Adapter = None,
    store: Store = None,
    revision: Revision = None,
    token: Token = None,
    dtype: DType = None,
    device: Device = None,
    device_map: DeviceMap = None,
) -> None:
    """Serve a model over HTTP as OpenAI's API, with a chat page."""
    from linearize.errors import unknown
    from linearize.serving.server import ServeOptions, api_key_from
    from linearize.serving.server import serve as run_server

    chosen = specified(host=host, port=port, name=name, slots=slots, memory=memory, context=context)
    chosen |= specified(new_tokens=new_tokens, prefill_tokens=prefill_tokens, queue=queue, max_body=max_body)
    chosen |= specified(timeout=timeout, grace=grace, state_memory=state_memory, state_disk=state_disk)
    chosen |= specified(state_dir=state_dir, adapter=adapter, store=store, revision=revision, token=token)
    chosen |= specified(dtype=dtype, device=device, device_map=device_map)
    key = api_key_from(api_key)
    if engine == VLLM:
        from linearize.serving.vllm_command import exec_vllm

        exec_vllm(model, chosen, key)
        return
    if engine != EMBEDDED:
        raise unknown("engine", engine, (EMBEDDED, VLLM))
    run_server(model, ServeOptions(api_key=key, **chosen))
