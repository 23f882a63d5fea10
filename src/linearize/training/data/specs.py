"""What a data SPEC names: files, or a data set of the Hub.

Files: `a.jsonl`, a folder, or a pattern as `dir/*.jsonl.gz`; `book.txt:whole` keeps what blank lines separate together.
Hub: `NAME`, `NAME:CONFIG`, `NAME@REVISION:SPLIT:COLUMN`; any part can be named, as `NAME:split=en:column=body`.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass, replace
from pathlib import Path

from linearize.errors import InputError
from linearize.storage.files import expand_home
from linearize.training.data.files import EXTENSIONS, check_file, data_kind
from linearize.training.data.text_lines import OPENERS

PSEUDO = "pseudo:"
"""Before a SPEC whose rows are prompts that the teacher answers."""
WHOLE = ":whole"
_HUB = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?((?::[^:]+)*)")
_SPLIT = re.compile(r"(train|valid|validation|val|dev|test)([\W_].*)?")
"""Names of splits that need no `split=`."""
_PARTS = ("config", "split", "column")


@dataclass(frozen=True, kw_only=True)
class HubName:
    """A data set of the Hub. `revision`: branch, tag or commit. `column`: of the text; None: by the row's fields."""

    name: str
    revision: str | None = None
    config: str | None = None
    split: str = "train"
    column: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A SPEC and what it names: either `files`, or a data set. `whole`: blank lines separate no documents of a text."""

    spec: str
    files: tuple[Path, ...] = ()
    hub: HubName | None = None
    whole: bool = False


def data_source(spec: str, *, whole: bool = False) -> DataSource:
    """What a SPEC names.

    Raises:
        InputError: no such file, nothing that can be read in a folder, or neither a file nor a Hub name.
    """
    path, suffix = _without_whole(expand_home(spec))
    if _looks_like_path(path):
        files = local_files(path)
        for file in files:
            check_file(file)
        return DataSource(spec=spec, files=files, whole=whole or suffix)
    return DataSource(spec=spec, hub=_hub_name(spec), whole=whole)


def local_files(spec: str) -> tuple[Path, ...]:
    """The files of a path, a folder or a pattern, sorted by name; of a path that is neither, the path itself."""
    path = Path(_without_whole(expand_home(spec))[0])
    if path.is_dir():
        return _files_in(path)
    if re.search(r"[*?[]", str(path)) and not path.exists():
        matching = tuple(sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()))
        if not matching:
            raise InputError(f"data {spec!r}: no file matches this pattern; check the path")
        return matching
    return (path,)


def input_paths(spec: str) -> tuple[Path, ...]:
    """The files and folders on this machine that a SPEC names, as far as they exist."""
    path, _ = _without_whole(expand_home(spec.removeprefix(PSEUDO)))
    if Path(path).exists():
        return (Path(path),)
    return local_files(path) if re.search(r"[*?[]", path) and glob.glob(path, recursive=True) else ()


def _without_whole(spec: str) -> tuple[str, bool]:
    return (spec.removesuffix(WHOLE), True) if spec.endswith(WHOLE) and not Path(spec).exists() else (spec, False)


def _looks_like_path(spec: str) -> bool:
    if "@" in spec and _HUB.fullmatch(spec) and not spec.startswith(".") and not Path(spec).exists():
        return False
    suffixed = re.search(r"\.[A-Za-z][A-Za-z0-9]{0,7}$", spec) is not None
    pathy = spec.startswith((".", "/", "~")) or "\\" in spec or spec.count("/") > 1 or re.search(r"[*?[]", spec)
    return suffixed or bool(pathy) or Path(spec).exists()


def _files_in(folder: Path) -> tuple[Path, ...]:
    """The data files of a folder, not those of its folders."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
    if (folder / "dataset_dict.json").is_file():
        splits = ", ".join(str(path) for path in entries if path.is_dir())
        raise InputError(f"data {str(folder)!r}: is a folder of splits; name one of them: {splits}")
    if (folder / "state.json").is_file():  # `save_to_disk` of `datasets`; its other files describe the data
        entries = [path for path in entries if path.suffix == ".arrow"]
    files = [path for path in entries if path.is_file() and data_kind(path) in EXTENSIONS]
    kinds = sorted({data_kind(path) for path in files})
    if not files:
        raise InputError(
            f"data {str(folder)!r}: is a folder without data files of its own; name a file in it, or a pattern like "
            f"'{folder}/*/*.jsonl' ({', '.join(EXTENSIONS)}; text also as {', '.join(OPENERS)})"
        )
    if len(kinds) > 1:
        raise InputError(
            f"data {str(folder)!r}: is a folder with files of several kinds ({', '.join(kinds)}): name those to read "
            f"by a pattern, like '{folder}/*{kinds[0]}'"
        )
    return tuple(files)


def _hub_name(spec: str) -> HubName:
    match = _HUB.fullmatch(spec)
    if match is None:
        raise InputError(
            f"data {spec!r}: neither a file nor a Hub dataset name (owner/name, owner/name:config, or "
            "owner/name@revision:split:column)"
        )
    hub = HubName(name=match[1], revision=match[2])
    after_split = False
    for part in match[3].split(":")[1:]:
        key, equals, value = part.partition("=")
        if equals and key in _PARTS:
            named = key
        else:
            value = part
            named = "split" if _SPLIT.fullmatch(part) and not after_split else "column" if after_split else "config"
        if getattr(hub, named) != getattr(HubName, named):
            raise InputError(
                f"data {spec!r}: names two of {named}; write NAME@REVISION:CONFIG:SPLIT:COLUMN, or a part by its name, "
                f"as :{named}={value}"
            )
        after_split = after_split or named == "split"
        hub = replace(hub, **{named: value})
    return hub
