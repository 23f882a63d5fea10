"""The states of conversations: a next turn goes on from the longest beginning of its text that was read before.

A state's key is its length and a digest of the tokens that it has read. All keys of a text come from one pass over its
tokens. States are in memory first; those of chats are also written to disk, by a thread of their own, so that neither a
slow nor a full disk holds up an answer.
"""

from __future__ import annotations

import array
import hashlib
import queue
import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from linearize.errors import one_line
from linearize.modeling.text_cache import SavedText
from linearize.serving.notices import notice
from linearize.serving.state_files import Key, StateFiles

Keep = Literal["no", "memory", "disk"]
MOST_UNWRITTEN = 32  # states that wait to be written; more are not written
HEADER = 16  # tokens at a prompt's end in which a chat template begins the answer


def resume_point(prompt: Sequence[int], special: Collection[int]) -> int:
    """How many tokens of a prompt begin every text that goes on from it: those up to the last special token of the
    answer's header, since an answer that begins with a line break may join the token before it; else all."""
    for length in range(len(prompt), max(0, len(prompt) - HEADER), -1):
        if prompt[length - 1] in special:
            return length
    return len(prompt)


class ConversationStore:
    """States by the tokens that they have read, at most `limit` bytes of them in memory.

    `dropped`: states that could not be written. Methods may be called from any thread.
    """

    def __init__(self, limit: int, files: StateFiles | None = None) -> None:
        self.limit, self.files = limit, files
        self.num_bytes = self.dropped = 0
        self._memory: OrderedDict[Key, SavedText] = OrderedDict()
        self._on_disk: set[Key] = set() if files is None else files.keys()
        self._lengths = Counter(length for length, _ in self._on_disk)
        self._lock = threading.Lock()
        self._unwritten: queue.Queue[tuple[Key, SavedText] | None] = queue.Queue(MOST_UNWRITTEN)
        self._writer = threading.Thread(target=self._write_all, name="linearize-states", daemon=True)
        self._warned = False
        if files is not None:
            self._writer.start()

    def find(self, tokens: Sequence[int]) -> SavedText | None:
        """The state after the most of these tokens, short of the last one: a prompt's last token is always read."""
        with self._lock:
            lengths = sorted(length for length, count in self._lengths.items() if count and length < len(tokens))
        for key in reversed(list(_keys(tokens, lengths))):
            saved = self._get(key)
            if saved is not None:
                return saved
        return None

    def keep(self, tokens: Sequence[int], saved: SavedText, where: Keep) -> None:
        """Store the state after these tokens."""
        if where == "no":
            return
        key = next(_keys(tokens, [len(tokens)]))
        with self._lock:
            self._put_in_memory(key, saved)
        if where == "disk" and self.files is not None:
            try:
                self._unwritten.put_nowait((key, saved))
            except queue.Full:
                self._drop("the disk is slower than the conversations")

    def close(self) -> None:
        """Write what waits to be written."""
        if self._writer.is_alive():
            self._unwritten.put(None)
            self._writer.join()

    def flush(self) -> None:
        """Wait until all that waits is written or dropped."""
        self._unwritten.join()

    def _get(self, key: Key) -> SavedText | None:
        with self._lock:
            if key in self._memory:
                self._memory.move_to_end(key)
                return self._memory[key]
            if key not in self._on_disk or self.files is None:
                return None
        saved = self.files.read(key)
        with self._lock:
            if saved is not None:
                self._put_in_memory(key, saved)
            elif key in self._on_disk:
                self._on_disk.remove(key)
                self._lengths[key[0]] -= 1
        return saved

    def _put_in_memory(self, key: Key, saved: SavedText) -> None:
        if saved.num_bytes > self.limit:
            return
        old = self._memory.pop(key, None)
        if old is None:
            self._lengths[key[0]] += 1
        self._memory[key] = saved
        self.num_bytes += saved.num_bytes - (0 if old is None else old.num_bytes)
        while self.num_bytes > self.limit:
            gone, dropped = self._memory.popitem(last=False)
            self.num_bytes -= dropped.num_bytes
            self._lengths[gone[0]] -= 1

    def _write_all(self) -> None:
        """The writer's thread."""
        while (entry := self._unwritten.get()) is not None:
            self._write(*entry)
            self._unwritten.task_done()
        self._unwritten.task_done()

    def _write(self, key: Key, saved: SavedText) -> None:
        assert self.files is not None
        try:
            self.files.write(key, saved)
        except Exception as error:
            self._drop(one_line(error))
            return
        there = self.files.keys()  # the write removed the least recently used; other servers may have added some
        with self._lock:
            self._warned = False
            self._lengths.subtract(length for length, _ in self._on_disk - there)
            self._lengths.update(length for length, _ in there - self._on_disk)
            self._lengths = +self._lengths
            self._on_disk = there

    def _drop(self, why: str) -> None:
        self.dropped += 1
        if not self._warned:
            self._warned = True
            notice(f"conversation states are not written to disk for now: {why}")


def _keys(tokens: Sequence[int], lengths: Sequence[int]) -> Iterator[Key]:
    """The keys of a text's beginnings of these lengths, shortest first."""
    digest, done = hashlib.sha256(), 0
    for length in lengths:
        digest.update(array.array("q", tokens[done:length]).tobytes())
        done = length
        yield length, digest.copy().hexdigest()
