"""The work folder of a conversion, `.OUT.run` next to the student's folder: its log, and the mark of its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.metrics.report import FILE_NAME as REPORT
from linearize.storage.atomic import atomic_write_text, check_free, discard
from linearize.storage.disk import not_created
from linearize.storage.files import read_json, read_text
from linearize.training.checkpoint import check_formats
from linearize.training.distributed import Group

ENDED = "ended.json"


def work_folder(final: Path) -> Path:
    """The folder of checkpoints and log until the student is complete."""
    return final.parent / f".{final.name}.run"


def log_folder(work: Path, group: Group) -> Path:
    """The folder of this process's log: processes other than the first log the blocks that they train."""
    return work / "log" if group.leads else work / "log" / f"process-{group.rank}"


def make_work(work: Path, final: Path) -> None:
    """Make the work folder. Raises InputError."""
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_created(final, error) from error


def mark_ended(folder: Path, work: Path, identity: Mapping[str, Any]) -> None:
    """Record in `work` which student it made: once the folder has its final name, nothing is left to do."""
    record = {"report": read_text(folder / REPORT), "identity": identity}
    atomic_write_text(work / ENDED, json.dumps(record))


def ended(final: Path, work: Path) -> Any:
    """The identity of a run that was killed after its student had got its final name; else None."""
    if not (work / ENDED).is_file() or not (final / REPORT).is_file():
        return None
    record = read_json(work / ENDED)
    return record.get("identity") if record["report"] == read_text(final / REPORT) else None


def is_written(final: Path, work: Path, identity: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether a run of the same call was killed after its last step; if not, the folder is free and `work` can be used.

    Raises:
        InputError: the folder is not free, or `work` belongs to another version.
    """
    if (last := ended(final, work)) is not None:
        if last != identity:
            check_free(final, overwrite)
        discard(work)
        if last == identity:
            return True
    check_free(final, overwrite)
    check_formats(work)
    return False
