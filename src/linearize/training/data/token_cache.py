"""Tokenized text, kept in a cache folder under a hash of all that it depends on, so that it is made once.

    CACHE/tokens/HASH/          one store (`token_store`), written whole or not at all
    CACHE/tokens/HASH.lock      held while the store is written
    CACHE/tokens/HASH.use       shared by the processes that use the store
    CACHE/tokens/files/         checksums of source files, by path, size and time of change
    CACHE/tokens/commits/       the commits of Hub data sets, for the time without a network

The cache is bounded: where it grows beyond `$LINEARIZE_CACHE_SIZE`, the stores used least recently are removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from linearize.errors import InputError
from linearize.numbers import parse_size
from linearize.phases import phase
from linearize.storage.atomic import atomic_folder, atomic_write_text
from linearize.storage.disk import is_disk_full, writing
from linearize.storage.journal import default_cache
from linearize.storage.locks import clear_leftovers, lock
from linearize.training.data.documents import tokenized
from linearize.training.data.files import is_txt
from linearize.training.data.hub import commit_of
from linearize.training.data.row_fields import RowNotes
from linearize.training.data.sources import is_cut_at_blank_lines, iterate_examples
from linearize.training.data.specs import DataSource, HubName
from linearize.training.data.token_store import (
    FORMAT,
    META,
    DamagedStoreError,
    StoreFacts,
    TokenStore,
    file_checksum,
    store_writer,
)

KIND = "tokens"
SIZE_VARIABLE = "LINEARIZE_CACHE_SIZE"
DEFAULT_SIZE = 50 * 10**9
_SETTLED = 2.0  # seconds after which a file that changes has another time of change, on any file system
LOG = logging.getLogger("linearize")


def token_cache() -> Path:
    """The folder of all tokenized text, see `journal.default_cache`."""
    return default_cache(KIND)


def cached_store(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, *, answer_only: bool, cache: Path
) -> tuple[TokenStore, bool]:
    """The tokens of a data source, and whether they were in the cache; made and kept there if not.

    Processes that ask for the same tokens take turns: the first one makes them.

    Raises:
        InputError: text that cannot be used, or a cache that cannot be written; DiskFullError.
    """
    if source.hub is not None:
        source = replace(source, hub=replace(source.hub, revision=_commit(source.hub, cache)))
    folder = cache / _key(source, tokenizer, answer_only, cache)
    if (store := _opened(folder)) is not None:
        return store, True
    try:
        cache.mkdir(parents=True, exist_ok=True)
        descriptor = lock(_next_to(folder, "lock"), folder, waits=lambda holder: _print_wait(source.spec, holder))
    except (OSError, InputError) as error:
        if is_disk_full(error):
            raise
        raise InputError(
            f"{cache}, which keeps tokenized text, cannot be written ({error}): set LINEARIZE_CACHE to a folder that "
            "can"
        ) from error
    try:
        if (store := _opened(folder, again=True)) is not None:  # another process has made it
            return store, True
        clear_leftovers(folder)
        with writing("the tokenized text", cache), atomic_folder(folder, overwrite=True, locked=True) as temporary:
            write_store(source, tokenizer, temporary, answer_only=answer_only)
    finally:
        os.close(descriptor)
    store = TokenStore.open(folder, check=False)
    _hold(store, folder)
    remove_least_recent(cache)
    return store, False


def write_store(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, folder: Path, *, answer_only: bool = False
) -> None:
    """Tokenize a data source into an empty folder, a portion at a time. Raises InputError."""
    notes = RowNotes()
    size = sum(file.stat().st_size for file in source.files) or None
    begun, documents, tokens = time.monotonic(), 0, 0
    with (
        phase(f"tokenizing {source.spec}", size, "bytes") as advance,
        store_writer(folder, _largest_token(tokenizer)) as writer,
    ):
        examples = iterate_examples(source, tokenizer, notes, answer_only=answer_only, advance=advance)
        for part in tokenized(examples, tokenizer, answer_only=answer_only):
            writer.add(part)
            documents, tokens = documents + len(part), tokens + sum(map(len, part))
        writer.finish(
            StoreFacts(cut_at_blank_lines=is_cut_at_blank_lines(source, tokenizer), notes=notes.lines()),
            spec=source.spec, documents=documents, tokens=tokens, seconds=round(time.monotonic() - begun, 1),
        )  # fmt: skip


def remove_least_recent(cache: Path, max_bytes: int | None = None) -> list[Path]:
    """Remove the stores used least recently until all take `max_bytes` (None: as set), but none in use.

    Returns the folders that are gone.
    """
    bound = _max_bytes() if max_bytes is None else max_bytes
    used = {}
    for meta in cache.glob(f"*/{META}"):
        with suppress(OSError):  # another process may remove it
            size = sum(file.stat().st_size for file in meta.parent.iterdir())
            used[meta.parent] = (meta.stat().st_mtime, size)
    total, removed = sum(size for _, size in used.values()), list[Path]()
    for folder in sorted(used, key=lambda folder: used[folder]):
        if total <= bound:
            break
        with suppress(InputError, OSError), _locked(_next_to(folder, "use"), folder):
            shutil.rmtree(folder)
            removed.append(folder)
            total -= used[folder][1]
            for kind in ("use", "lock"):
                _next_to(folder, kind).unlink(missing_ok=True)
    for partial in cache.glob(".*.partial-*"):  # what killed processes left
        folder = cache / partial.name[1:].partition(".")[0]
        with suppress(InputError, OSError), _locked(_next_to(folder, "lock"), folder):
            shutil.rmtree(partial)
    return removed


@contextmanager
def _locked(path: Path, folder: Path) -> Iterator[None]:
    """Hold a lock that no other process holds. Raises InputError where one does."""
    descriptor = lock(path, folder)
    try:
        yield
    finally:
        os.close(descriptor)


def content_checksum(path: Path, cache: Path) -> str:
    """The checksum of a file's bytes; one that has the size and time of change of an earlier call is not read again."""
    path = path.resolve()
    status = path.stat()
    state = [str(path), status.st_size, status.st_mtime_ns, status.st_ino]
    known = cache / "files" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:24]}.json"
    with suppress(OSError, ValueError):
        *before, checksum = json.loads(known.read_text("utf-8"))
        if before == state and isinstance(checksum, str):
            return checksum
    with phase(f"reading {path.name}"):
        checksum = file_checksum(path)
    if time.time() - status.st_mtime > _SETTLED:  # else it may still change within the same tick of the clock
        with suppress(OSError):
            known.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(known, json.dumps([*state, checksum]))
    return checksum


def _key(source: DataSource, tokenizer: PreTrainedTokenizerBase, answer_only: bool, cache: Path) -> str:
    """A hash of all that the tokens depend on."""
    if source.hub is not None:
        text: Any = ["hub", vars(source.hub)]
    else:
        whole = source.whole and any(map(is_txt, source.files))
        text = ["files", [[file.suffixes[-2:], content_checksum(file, cache)] for file in source.files], whole]
    parts = [FORMAT, text, tokenizer_identity(tokenizer), answer_only]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _commit(hub: HubName, cache: Path) -> str | None:
    """The commit of a Hub data set; without a network the one of the last time, or the revision as it is."""
    known = cache / "commits" / f"{hashlib.sha256(json.dumps([hub.name, hub.revision]).encode()).hexdigest()[:24]}.txt"
    commit = commit_of(hub)
    with suppress(OSError):
        if commit is None:
            commit = known.read_text("utf-8")
            LOG.warning("data %r: the Hub cannot be reached; this is its commit %s of the last time", hub.name, commit)
        else:
            known.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(known, commit)
    return commit or hub.revision


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what the tokens and the text of chats depend on."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        for changed_by_calls in ("truncation", "padding"):
            rules.pop(changed_by_calls, None)
    else:
        rules = sorted(tokenizer.get_vocab().items())
    model = getattr(tokenizer, "vocab_file", None)
    rules_file = file_checksum(Path(model)) if backend is None and model and Path(model).is_file() else None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    parts = [
        type(tokenizer).__name__, version("tokenizers"), rules, rules_file, special, ids, tokenizer.chat_template,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _opened(folder: Path, *, again: bool = False) -> TokenStore | None:
    """The store in a folder, checked; None where there is none, or a damaged one, which is reported but `again`."""
    if not folder.is_dir():
        return None
    try:
        with phase("checking the kept tokens"):
            store = TokenStore.open(folder)
    except DamagedStoreError as error:
        if not again:
            LOG.warning("%s: the text is tokenized again", error)
        return None
    _hold(store, folder)
    with suppress(OSError):
        os.utime(folder / META)
    return store


def _hold(store: TokenStore, folder: Path) -> None:
    """Keep a store from being removed as long as this process uses it."""
    with suppress(InputError, OSError):
        weakref.finalize(store, os.close, lock(_next_to(folder, "use"), folder, shared=True))


def _next_to(folder: Path, kind: str) -> Path:
    return folder.with_name(f"{folder.name}.{kind}")


def _print_wait(spec: str, holder: str) -> None:
    print(f"linearize: {holder} is tokenizing {spec}: waiting for it", file=sys.stderr, flush=True)


def _largest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    return max([len(tokenizer) - 1, *tokenizer.get_vocab().values()])


def _max_bytes() -> int:
    value = os.environ.get(SIZE_VARIABLE)
    if not value:
        return DEFAULT_SIZE
    try:
        return parse_size(value)
    except InputError as error:
        raise InputError(f"{SIZE_VARIABLE}: {error}") from error
