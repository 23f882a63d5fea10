"""A full disk: one line that says what could not be written and where; nothing half-written; with free space the same
command continues."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_cases import assert_same, command, folder, one_line, own_text

from linearize.cli.main import main

__all__ = ["folder", "own_text"]  # fixtures


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 8 MB; the test skips where none may be mounted."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount here ({error})")
    if mounted.returncode:
        pytest.skip(f"may not mount a small file system here ({mounted.stderr.strip()})")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=False)


def leave(disk: Path, free_bytes: int | None) -> None:
    """Fill a disk except for `free_bytes`; None: remove the filler."""
    filler = disk / "filling"
    filler.unlink(missing_ok=True)
    if free_bytes is not None:
        filler.write_bytes(b"x" * max(0, shutil.disk_usage(disk).free - free_bytes))


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_same_command_continues(
    folder: Path, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, lines = small_disk / "student", []
    monkeypatch.setenv("LINEARIZE_CACHE", str(small_disk / "cache"))
    for free_bytes in (0, 90_000, 180_000, 400_000, 650_000):
        leave(small_disk, free_bytes)
        capsys.readouterr()
        if main(command(folder, out)) == 0:
            break
        line = one_line(capsys)
        assert "cannot be written to" in line and "No space left on device" in line and "free" in line
        lines.append(line)
        assert {path.name for path in small_disk.iterdir()} <= {"cache", "filling", ".student.run"}
    printed = " ".join(lines)
    assert "the text that the teacher writes" in printed and "the checkpoint cannot" in printed, printed
    leave(small_disk, None)
    if not out.exists():
        assert main(command(folder, out)) == 0
    assert_same(folder, out)


@pytest.mark.parametrize("verb", ["eval", "export"])
def test_a_full_disk_and_the_commands_that_take_a_student(
    folder: Path, small_disk: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    out = small_disk / "result"
    more = (
        ["--to", "hf"]
        if verb == "export"
        else ["--device", "cpu", "--data", str(folder / "text.txt"), "--tokens", "80"]
    )
    (folder / "text.txt").write_text("\n\n".join(f"Story {i}: the cat sat. The end of {i * 37}." for i in range(9)))
    arguments = [verb, str(folder / "whole"), "--out", str(out), *more]
    for free_bytes in (0, 20_000):
        leave(small_disk, free_bytes)
        capsys.readouterr()
        assert main(arguments) == 1
        printed = one_line(capsys)
        assert "No space left on device" in printed and "cannot be written to" in printed
        assert not (out / "report.json").exists() and not (out / "config.json").exists()
    leave(small_disk, None)
    assert main(arguments) == 0
    assert (out / ("config.json" if verb == "export" else "report.html")).is_file()


def test_a_limit_on_the_size_of_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, limits = tmp_path / "student", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
        code = main(command(folder, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and "File too large" in one_line(capsys) and not out.exists()
    assert main(command(folder, out)) == 0
    assert_same(folder, out)
