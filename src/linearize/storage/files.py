"""Files and folders written whole or not at all, by one run at a time; paths, text and JSON as people write them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from linearize.errors import InputError
from linearize.storage.disk import lock, not_created, sync, writing


def expand_home(path: str | os.PathLike[str]) -> str:
    """A path with the home folder in the place of a leading `~`; anything else, as a Hub name, as it is.

    Whatever takes a path from a person calls it once, first; a shell leaves `~` in `--out=~/student` to us.
    """
    return os.path.expanduser(path)


def well_formed(value: Any) -> Any:
    """A value with the replacement character for every half of a surrogate pair in its texts, at any depth.

    JSON may hold such a half, cut out of an emoji; no tokenizer takes it, and no file can hold it.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    elif isinstance(value, Mapping):
        return {key: well_formed(part) for key, part in value.items()}
    elif isinstance(value, list):
        return [well_formed(part) for part in value]
    return value


@contextmanager
def output_lock(final: Path | str, *, shared: bool = False) -> Iterator[None]:
    """One run at a time writes `final` (several with `shared`, which then keep out of each other's way themselves).

    The lock is the system's, on `.NAME.lock` beside the folder: it ends with the process, however that ends. Whoever
    has it alone first puts right what dead runs left behind (see `tidy`). File systems without locks have none.

    Raises:
        InputError: another run that lives has it, or the place cannot be written.
    """
    final = Path(expand_home(final)).resolve()
    made = _make_parents(final)
    path = final.parent / f".{final.name}.lock"
    descriptor = lock(path, final, shared=shared)
    try:
        if not shared:
            tidy(final)
        yield
    finally:
        if not shared:
            path.unlink(missing_ok=True)
        os.close(descriptor)
        for parent in made:  # a refused command leaves nothing behind
            with suppress(OSError):
                parent.rmdir()


def tidy(final: Path) -> None:
    """Remove what killed runs left beside `final`, and put back a folder that was stepping aside; see `output_lock`."""
    for aside in final.parent.glob(f".{_escaped(final.name)}.old-*"):
        if not final.exists() and (aside / final.name).is_dir():
            (aside / final.name).rename(final)
        shutil.rmtree(aside, ignore_errors=True)
    for folder in final.parent.glob(f".{_escaped(final.name)}.partial-*"):
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
    if final.is_dir():
        for file in final.glob(".*.partial-*"):
            file.unlink(missing_ok=True)


def discard(folder: Path) -> None:
    """Remove a folder in one step, as far as a kill is concerned: it loses its name first."""
    if folder.is_dir():
        doomed = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name.removesuffix('.run')}.partial-"))
        folder.rename(doomed / folder.name)
        shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def atomic_folder(final: Path | str, overwrite: bool = False, *, locked: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `final`; it takes the final name when the block ends well, else it is removed.

    Any exception (a full disk, Ctrl-C) leaves nothing at `final`, or, with `overwrite`, the old folder untouched:
    that one is removed only after the new one is complete. `locked`: the caller holds `output_lock(final)`.

    Raises:
        InputError: `final` exists and `overwrite` is off, is no folder, cannot be created, or is being written by
            another run; DiskFullError.
    """
    final = Path(expand_home(final)).resolve()
    check_free(final, overwrite)
    with nullcontext() if locked else output_lock(final), writing(f"the folder {final.name}", final.parent):
        temporary = _make_sibling(final)
        try:
            yield temporary
            check_free(final, overwrite)
            _sync_all(temporary)
            _swap_in(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text under a temporary name, then rename: a reader sees the old file or the new one, never half."""
    path = Path(expand_home(path)).resolve()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.partial-")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_text(path: Path | str) -> str:
    """The UTF-8 text of a file (a leading byte order mark dropped, line ends as `\\n`).

    Raises:
        InputError: no such file, a folder, no permission, or not UTF-8.
    """
    path = Path(expand_home(path))
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: is a folder, a file is needed; name a file in it") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def read_json(path: Path | str) -> Any:
    """The JSON document in a file.

    Raises:
        InputError: the file cannot be read or holds no JSON; names line and column.
    """
    text = read_text(path)
    try:
        return well_formed(json.loads(text))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: no valid JSON, {error.msg} (line {error.lineno}, column {error.colno})") from error


@contextmanager
def resumable_folder(final: Path | str, version: str) -> Iterator[Path]:
    """As `atomic_folder` with `overwrite`; what a kill or an error leaves is yielded again to the same `version`."""
    final = Path(expand_home(final)).resolve()
    work = final.parent / f".{final.name}.run"
    mark = work / ".version"
    with output_lock(final), writing(f"the folder {final.name}", final.parent):
        check_free(final, overwrite=True)
        if not mark.is_file() or read_text(mark) != version:
            discard(work)
            work.mkdir()
            atomic_write_text(mark, version)
        yield work
        check_free(final, overwrite=True)
        _sync_all(work)
        _swap_in(work, final)
        (final / mark.name).unlink()


def check_free(final: Path, overwrite: bool) -> None:
    if not final.exists():
        return
    if not final.is_dir():
        raise InputError(f"{final}: exists and is no folder; give another output folder")
    if not overwrite:
        raise InputError(f"{final}: output folder exists; give another one, or replace it with --overwrite")
    if Path.cwd().is_relative_to(final) or Path.home().is_relative_to(final):
        raise InputError(f"{final}: holds the working or home folder and is not replaced; give another output folder")


def real_name(name: str) -> str:
    """One spelling for all that mean the same place: of what exists the absolute path without links, else the name."""
    path = expand_home(name)
    return os.path.realpath(path) if os.path.exists(path) else name


def check_apart(final: Path, *read: Path | str) -> None:
    """Refuse an output folder that holds what is read, since `overwrite` would remove it.

    Raises:
        InputError: such a folder.
    """
    for name in read:
        path = Path(expand_home(name))
        if path.exists() and path.resolve().is_relative_to(final):
            raise InputError(f"{final}: is or holds {name}, which is read; give another output folder")


def _sync_all(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def _make_sibling(final: Path) -> Path:
    """An empty folder next to `final` (same file system, so that renaming is atomic), with ordinary permissions."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.partial-"))
    except OSError as error:
        raise not_created(final, error) from error
    temporary.chmod(0o777 & ~_umask())
    return temporary


def _make_parents(final: Path) -> list[Path]:
    """Make the folders above; returns those that were not there, the deepest first."""
    missing = [parent for parent in final.parents if not parent.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_created(final, error) from error
    return missing


def _escaped(name: str) -> str:
    """A name for `glob`, in which nothing stands for anything else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _swap_in(temporary: Path, final: Path) -> None:
    """Rename `temporary` to `final`; an old `final` steps aside first and comes back if that fails."""
    if not final.exists():
        temporary.rename(final)
        sync(final.parent)
        return
    aside = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.old-"))
    try:
        final.rename(aside / final.name)
        temporary.rename(final)
    except BaseException:
        if not final.exists():
            (aside / final.name).rename(final)
        with suppress(OSError):
            aside.rmdir()
        raise
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
