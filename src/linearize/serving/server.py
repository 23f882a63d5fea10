"""`linearize serve`: check the settings, take the address, load the model, serve until a signal."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import InputError
from linearize.phases import phase
from linearize.serving.notices import notice
from linearize.storage.files import expand_home

if TYPE_CHECKING:
    from linearize.serving.app import CountedApp
    from linearize.serving.state_files import StateFiles

KEY_VARIABLE = "LINEARIZE_API_KEY"
MISSING = "serve needs {}, which is not installed: pip install 'linearize[serve]'"


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Settings of the embedded server; sizes in bytes, times in seconds.

    `slots`: answers that are decoded together. `memory`: for their states (None: half of what is free). `context`:
    tokens of prompt and answer (None: what the model was made for). `new_tokens`: of an answer (None: the context).
    `prefill_tokens`: of a prompt that are read between two tokens of the answers. `queue`: prompts that wait.
    `state_memory`, `state_disk`: for the states of conversations (0: none). `state_dir`: where those on disk are
    (None: the user's cache). `grace`: how long answers may go on after a signal. `adapter` to `device_map`: as of
    `linearize.load`.
    """

    adapter: str | None = None
    store: int | None = None
    revision: str | None = None
    token: str | None = None
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key: str | None = None
    slots: int = 8
    memory: int | None = None
    context: int | None = None
    new_tokens: int | None = None
    prefill_tokens: int = 256
    queue: int = 256
    max_body: int = 2**24
    timeout: float = 600.0
    grace: float = 30.0
    state_memory: int = 10**9
    state_disk: int = 4 * 10**9
    state_dir: str | None = None

    def check(self) -> None:
        """Raise InputError for a setting out of range."""
        for name in ("slots", "prefill_tokens", "queue", "max_body", "context", "new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: it must be at least 1")
        if not 0 <= self.port <= 65535:
            raise InputError(f"port is {self.port}: give one from 1 to 65535, or 0 for any that is free")
        for name in ("timeout", "grace"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.api_key is not None and not self.api_key.isascii():
            raise InputError("the API key has characters that no HTTP header can hold: use ASCII ones")


def serve(model: str, options: ServeOptions) -> None:
    """Serve a model until SIGINT or SIGTERM.

    Raises:
        InputError: settings, an address or a model that cannot be used, or a missing extra.
    """
    from linearize.modeling.prepacked_linear import packed_projections

    options.check()
    if options.state_dir is not None:
        _make_folder(Path(expand_home(options.state_dir)))
    for library in ("fastapi", "uvicorn", "prometheus_client"):
        try:
            __import__(library)
        except ImportError as error:
            raise InputError(MISSING.format(library.replace("_", "-"))) from error
    with _bound(options.host, options.port) as sock:
        app, described = build(model, options)
        lines = [f"{described}, at {_address(sock)}; Ctrl-C stops it"]
        if not _is_loopback(options.host) and options.api_key is None:
            lines.append(f"anybody who reaches {options.host} can use this server: set --api-key or {KEY_VARIABLE}")
        with packed_projections(app.service.engine.model):  # where they are in fp32 on a CPU
            _run(app, sock, options.grace, lines)


def build(model: str, options: ServeOptions) -> tuple[CountedApp, str]:
    """The application for a model, and what it is in words.

    Raises:
        InputError: a model or settings that do not fit.
    """
    from linearize.decoding.loading import load_any

    loaded, tokenizer = load_any(
        model, adapter=options.adapter, store=options.store, revision=options.revision, token=options.token,
        dtype=options.dtype, device=options.device, device_map=options.device_map,
    )  # fmt: skip
    return build_app(loaded, tokenizer, _names(model, options), options)


def build_app(model: Any, tokenizer: Any, names: list[str], options: ServeOptions) -> tuple[CountedApp, str]:
    """`build` for a model in memory, which requests may call by any of these names."""
    from linearize.decoding.speculative.logits_processing import vocabulary_size
    from linearize.modeling.text_cache import TextCaches
    from linearize.serving.app import create_app
    from linearize.serving.conversations import ConversationStore
    from linearize.serving.engine import Engine
    from linearize.serving.metrics import ServerMetrics
    from linearize.serving.rows import rows_for
    from linearize.serving.service import Limits, Service

    context = options.context or getattr(model.config.get_text_config(), "max_position_embeddings", None) or 4096
    caches = TextCaches(model)
    memory = _free_memory(model.device) // 2 if options.memory is None else options.memory
    rows, count = rows_for(model, caches, most=options.slots, capacity=context, memory=memory)
    store = ConversationStore(options.state_memory, _state_files(model, options) if caches.can_save else None)
    metrics = ServerMetrics()
    metrics.watch("states_dropped", "Conversation states that could not be written.", lambda: store.dropped)
    metrics.watch("states_memory_bytes", "Conversation states in memory.", lambda: store.num_bytes)
    engine = Engine(
        model,
        tokenizer,
        rows,
        most_rows=count,
        caches=caches,
        store=store,
        metrics=metrics,
        prefill_tokens=options.prefill_tokens,
        most_waiting=options.queue,
    )
    service = Service(
        names=names,
        tokenizer=tokenizer,
        vocabulary=vocabulary_size(model),
        engine=engine,
        limits=Limits(context=context, new_tokens=options.new_tokens or context, timeout=options.timeout),
    )
    app = create_app(service, api_key=options.api_key, max_body=options.max_body)
    together = "together" if type(rows).__name__ == "StaticRows" else "in turns"
    return app, f"{names[0]} is served, {count} answers {together}, up to {context:,} tokens each"


def _names(model: str, options: ServeOptions) -> list[str]:
    """What requests may call the model: its name alone of a folder, and what was typed."""
    own = options.adapter or model
    path = Path(expand_home(own))
    name = options.name or (path.resolve().name if path.exists() else own)
    return [name] if options.name or name == model else [name, model]


def _state_files(model: Any, options: ServeOptions) -> StateFiles | None:
    """The states on disk of exactly this model, or None."""
    from linearize.modeling.io.integrity import model_fingerprint
    from linearize.serving.state_files import StateFiles
    from linearize.storage.journal import default_cache
    from linearize.version import __version__

    if options.state_disk == 0:
        return None
    with phase("checksum of the weights, by which conversations are stored"):
        fingerprint = f"{__version__}-{model_fingerprint(model)}"
    own = options.state_dir
    folder = (default_cache("conversations") if own is None else Path(expand_home(own))) / fingerprint
    try:
        return StateFiles(folder, options.state_disk)
    except OSError as error:
        if own is None:
            notice(f"{folder} cannot be written ({error.strerror}): conversations are stored in memory alone")
            return None
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another --state-dir") from error


def _make_folder(folder: Path) -> None:
    """Raises InputError where it cannot be made or written, before the model is loaded."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}); give another --state-dir") from error
    if not writable:
        raise InputError(f"{folder}: cannot be written; give another --state-dir")


def _free_memory(device: Any) -> int:
    """Bytes that are free on a device."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return 4 * 10**9
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 4 * 10**9)


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at the address, taken before the model is loaded.

    Raises:
        InputError: an address that is in use, not this machine's, or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InputError(f"host {host!r} is unknown here ({error.strerror}): give 127.0.0.1, or 0.0.0.0") from error
    with sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError as error:
            why = f"{host}:{port} cannot be used ({error.strerror})"
            raise InputError(f"{why}: give another --port or --host") from error
        yield sock


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _run(app: CountedApp, sock: socket.socket, grace: float, ready: Sequence[str]) -> None:
    """Serve until a signal; the lines `ready` are printed once a signal would end it as it should."""
    import uvicorn

    class Server(uvicorn.Server):
        """Stops at a signal and returns, where uvicorn would raise the signal again."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            signals = (signal.SIGINT, signal.SIGTERM)
            before = {number: signal.signal(number, self.handle_exit) for number in signals}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for line in ready:
                notice(line)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            app.service.engine.refuse()
            await super().shutdown(sockets)

        def handle_exit(self, sig: int, frame: Any) -> None:
            if not self.should_exit:
                notice(f"stopping; answers have {grace:.0f} s to end (Ctrl-C again: none)")
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app, log_config=None, log_level="critical", access_log=False, lifespan="on",
        timeout_graceful_shutdown=max(1, round(grace)), timeout_keep_alive=30,
    )  # fmt: skip
    asyncio.run(Server(config).serve(sockets=[sock]))


def api_key_from(option: str | None) -> str | None:
    """The key that was given as an option, else that in the environment; None: there is none."""
    return option or os.environ.get(KEY_VARIABLE) or None
