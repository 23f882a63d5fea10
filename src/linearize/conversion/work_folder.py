"""The folder of a conversion on its way, beside that of its student."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linearize.metrics.report import FILE_NAME as REPORT
from linearize.storage.disk import not_created
from linearize.storage.files import atomic_write_text, check_free, discard, read_json, read_text
from linearize.training.checkpoint import check_formats
from linearize.training.distributed import Group

ENDED = "ended.json"


def work_folder(final: Path) -> Path:
    """Checkpoints and the log lie here until the student is whole."""
    return final.parent / f".{final.name}.run"


def log_folder(work: Path, group: Group) -> Path:
    """Where the numbers of this process go: other processes than the first log the blocks that they train."""
    return work / "log" if group.leads else work / "log" / f"process-{group.rank}"


def make_work(work: Path, final: Path) -> None:
    """Make it. Raises InputError."""
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_created(final, error) from error


def mark_ended(folder: Path, work: Path, wanted: Mapping[str, Any]) -> None:
    """Note in `work` which student it led to: from when the folder has its final name, nothing is left to do."""
    record = {"report": read_text(folder / REPORT), "wanted": wanted}
    atomic_write_text(work / ENDED, json.dumps(record))


def ended(final: Path, work: Path) -> Any:
    """What was wanted of a run that was killed when its student had its final name already; else None."""
    if not (work / ENDED).is_file() or not (final / REPORT).is_file():
        return None
    record = read_json(work / ENDED)
    return record["wanted"] if record["report"] == read_text(final / REPORT) else None


def is_written(final: Path, work: Path, wanted: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether a run of the same call was killed after its last step; else the folder is free and `work` can be used.

    Raises:
        InputError: the folder is not free, or `work` belongs to another version.
    """
    if (last := ended(final, work)) is not None:
        if last != wanted:
            check_free(final, overwrite)
        discard(work)
        if last == wanted:
            return True
    check_free(final, overwrite)
    check_formats(work)
    return False
