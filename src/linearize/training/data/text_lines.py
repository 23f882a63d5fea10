"""The lines of a text file, decompressed according to its name, a few at a time; and the documents of a `.txt` file.

A file may be larger than memory: no more than a buffer, or one document, is held.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from linearize.errors import InputError, one_line

Advance = Callable[[int], None]
"""Called with how many bytes more of a file on the disk were read."""
END_OF_TEXT = "<|endoftext|>"
"""GPT-2's end of a text, which many text files (TinyStories) have between documents, whatever the tokenizer."""
_BUFFER = 2**20
_BLANK = re.compile(r"[ \t]*\n")


def ignore_bytes(_count: int) -> None:
    """The `Advance` of a file whose progress nobody follows."""


def text_lines(path: Path, advance: Advance = ignore_bytes) -> Iterator[str]:
    """The lines of a file with their ends, which are `\\n` whatever the file has; a leading byte order mark is dropped.

    Raises:
        InputError: a file that cannot be read, is not UTF-8 or is not compressed as its name says.
    """
    with _reported(path), _opened(path, advance) as file:
        yield from io.TextIOWrapper(file, encoding="utf-8-sig")


def whole_text(path: Path, advance: Advance = ignore_bytes) -> str:
    """The text of a file at once. Raises as `text_lines`."""
    return "".join(text_lines(path, advance))


def cuts_at_blank_lines(path: Path, ends: Sequence[str]) -> bool:
    """Whether blank lines separate the documents of a text file: it has no line of `ends` between two of them."""
    is_end, text_before = _line_of(ends), False
    parts = 0
    for line in text_lines(path):
        if is_end(line):
            text_before = False
        elif line.strip() and not text_before:
            text_before, parts = True, parts + 1
            if parts == 2:
                return False
    return True


def text_documents(lines: Iterable[str], ends: Sequence[str], *, blank_lines: bool) -> Iterator[str]:
    """The documents of a text: lines of `ends` separate them, and with `blank_lines` those do too.

    Line ends around a document are dropped. Documents without text are left out.
    """
    is_end = _line_of(ends)
    document: list[str] = []
    for number, line in enumerate(lines):
        if is_end(line) or (blank_lines and number > 0 and _BLANK.fullmatch(line)):
            yield from _text_of(document)
            document = []
        else:
            document.append(line)
    yield from _text_of(document)


def _text_of(document: Sequence[str]) -> Iterator[str]:
    text = "".join(document)
    if text.strip():
        yield text.strip("\n")


def _line_of(ends: Sequence[str]) -> Callable[[str], bool]:
    pattern = re.compile(rf"[ \t]*(?:{'|'.join(map(re.escape, ends))})[ \t]*\n?")
    return lambda line: pattern.fullmatch(line) is not None


class _Counted(io.FileIO):
    """A file that reports the bytes that are read."""

    advance: Advance = staticmethod(ignore_bytes)

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self.advance(count or 0)
        return count


@contextmanager
def _opened(path: Path, advance: Advance) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed."""
    raw = _Counted(path)
    raw.advance = advance
    with raw, io.BufferedReader(raw, _BUFFER) as packed:
        yield OPENERS.get(path.suffix.lower(), lambda file: file)(packed)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn errors of reading into one line each."""
    kind = path.suffix.lower().removeprefix(".")
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {_first_wrong_byte(path)}); convert it to UTF-8") from error
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the path") from error
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if path.suffix.lower() not in OPENERS:
            raise InputError(f"{path}: cannot be read ({one_line(error)})") from error
        raise InputError(f"{path}: not a valid {kind} file ({one_line(error)}); get it again") from error


def _first_wrong_byte(path: Path) -> int:
    """Where a file stops being UTF-8, counted after decompression."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with _opened(path, ignore_bytes) as file:
        while data := file.read(_BUFFER):
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(data)
            except UnicodeDecodeError as error:
                return done - held + error.start
            done += len(data)
    return done


def _zstd(file: IO[bytes]) -> IO[bytes]:
    import pyarrow  # type: ignore[import-untyped]

    if not pyarrow.Codec.is_available("zstd"):
        raise InputError("this build of pyarrow cannot read .zst: unpack the file first (zstd -d)")
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


def _gzip(file: IO[bytes]) -> IO[bytes]:
    return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]


OPENERS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {".gz": _gzip, ".zst": _zstd, ".bz2": bz2.open, ".xz": lzma.open}
"""How compressed text is opened, by the extension that follows that of the text."""
