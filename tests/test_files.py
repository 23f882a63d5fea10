"""Files and folders are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from linearize.errors import InputError
from linearize.storage.atomic import atomic_folder, atomic_write_text, discard
from linearize.storage.files import read_json, read_text
from linearize.storage.locks import output_lock


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def _old(folder: Path) -> Path:
    final = folder / "student"
    final.mkdir()
    (final / "old.txt").write_text("old")
    return final


def test_a_folder_appears_only_when_complete(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "student"
    with atomic_folder(final) as folder:
        (folder / "a.txt").write_text("a")
        (folder / "inner").mkdir()
        assert not final.exists()
        assert folder.parent == final.parent
    assert _names(final) == ["a.txt", "inner"]
    assert _names(final.parent) == ["student"]


def test_a_folder_has_the_permissions_of_an_ordinary_one(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with atomic_folder(tmp_path / "student"):
        pass
    assert stat.S_IMODE((tmp_path / "student").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), SystemExit(3)]
)
def test_a_failure_leaves_nothing_behind(tmp_path: Path, error: BaseException, overwrite: bool) -> None:
    if overwrite:
        _old(tmp_path)
    with pytest.raises(type(error)), atomic_folder(tmp_path / "student", overwrite) as folder:
        (folder / "half.bin").write_bytes(b"x" * 7)
        raise error
    assert _names(tmp_path) == (["student"] if overwrite else [])
    if overwrite:
        assert (tmp_path / "student" / "old.txt").read_text() == "old"


def test_files_that_a_library_gave_to_their_owner_alone_are_as_readable_as_others(tmp_path: Path) -> None:
    """As safetensors writes them; an executable stays one."""
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "student") as folder:
            for name, mode in (("model.safetensors", 0o600), ("tool", 0o700)):
                (folder / name).write_text(name)
                (folder / name).chmod(mode)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "student").iterdir()}
    assert modes == {"model.safetensors": 0o640, "tool": 0o740}


def test_an_existing_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    final = _old(tmp_path)
    with pytest.raises(InputError, match="overwrite"), atomic_folder(final):
        raise AssertionError("the block must not run")
    assert _names(final) == ["old.txt"]


def test_a_folder_that_appears_during_the_work_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists"), atomic_folder(tmp_path / "student"):
        _old(tmp_path)
    assert _names(tmp_path) == ["student"]
    assert _names(tmp_path / "student") == ["old.txt"]


def test_overwrite_replaces_the_whole_folder_at_the_end(tmp_path: Path) -> None:
    final = _old(tmp_path)
    with atomic_folder(final, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
        assert _names(final) == ["old.txt"]
    assert _names(final) == ["new.txt"]
    assert _names(tmp_path) == ["student"]


def test_the_old_folder_comes_back_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = _old(tmp_path)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="broken"), atomic_folder(final, overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert _names(tmp_path) == ["student"]
    assert _names(final) == ["old.txt"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    final = _old(tmp_path)
    (tmp_path / "link").symlink_to(final)
    with atomic_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "new.txt").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert _names(final) == ["new.txt"]


def test_targets_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="not a folder"), atomic_folder(tmp_path / "file", overwrite=True):
        pass
    with pytest.raises(InputError, match="cannot create"), atomic_folder(tmp_path / "file" / "student"):
        pass
    monkeypatch.chdir(_old(tmp_path))
    with pytest.raises(InputError, match="working"), atomic_folder(tmp_path, overwrite=True):
        pass
    assert _names(tmp_path) == ["file", "student"]


def test_what_dead_runs_left_is_put_right(tmp_path: Path) -> None:
    for name in (".student.partial-a", ".student.old-b", ".student2.partial-c", ".student.run"):
        (tmp_path / name / "student").mkdir(parents=True)
    (tmp_path / ".student.old-b" / "student" / "old.txt").write_text("old")
    with output_lock(tmp_path / "student"):
        assert _names(tmp_path) == [".student.lock", ".student.run", ".student2.partial-c", "student"]
        assert (tmp_path / "student" / "old.txt").read_text() == "old", "it was killed between two renames"
    (tmp_path / ".student.old-d" / "student").mkdir(parents=True)
    (tmp_path / "student" / ".report.json.partial-e").write_text("half")
    with output_lock(tmp_path / "student"):
        pass
    assert _names(tmp_path) == [".student.run", ".student2.partial-c", "student"]
    assert _names(tmp_path / "student") == ["old.txt"]


def test_two_locks_on_one_folder(tmp_path: Path) -> None:
    with output_lock(tmp_path / "deep" / "student"):
        with (
            pytest.raises(InputError, match=rf"is being written by process {os.getpid()} on .*: wait") as caught,
            output_lock(tmp_path / "deep" / "student"),
        ):
            raise AssertionError("the block must not run")
        assert "\n" not in str(caught.value)
        with output_lock(tmp_path / "deep" / "other"):
            pass
    assert _names(tmp_path) == [], "nothing is left of a command that did nothing"
    with (
        output_lock(tmp_path / "shared", shared=True),
        output_lock(tmp_path / "shared", shared=True),
        pytest.raises(InputError),
        output_lock(tmp_path / "shared"),
    ):
        raise AssertionError("the block must not run")


def test_a_folder_is_discarded_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".student.run" / "deep").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(
            "linearize.storage.atomic.shutil.rmtree", lambda *_, **__: None
        )  # killed before anything was removed
        discard(tmp_path / ".student.run")
    assert not (tmp_path / ".student.run").exists()
    with output_lock(tmp_path / "student"):
        pass
    assert _names(tmp_path) == []


def test_text_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    atomic_write_text(path, "first é\n")
    path.chmod(0o640)
    atomic_write_text(path, "second\n")
    assert path.read_text(encoding="utf-8") == "second\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write_text(path, "third\n")
    assert path.read_text(encoding="utf-8") == "second\n"
    assert _names(tmp_path) == ["report.json"]


def test_reading_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1, 2]}')
    assert read_json(path) == {"a": [1, 2]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n oops}', r"line 2, column 2"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (None, "no such file"),
        ("dir", "folder"),
    ],
)
def test_json_errors_are_one_line(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    path = tmp_path / "a.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "dir":
        path.mkdir()
    with pytest.raises(InputError, match=message) as caught:
        read_json(path)
    assert "\n" not in str(caught.value)
    assert "a.json" in str(caught.value)


def test_text_line_ends_are_unified(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n")
    assert read_text(tmp_path / "a.txt") == "one\ntwo\n"
