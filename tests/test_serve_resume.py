"""A conversation goes on from its stored state: a turn reads its own tokens alone, also after a restart; what is
damaged or cannot be written costs the state, never the answer."""

from __future__ import annotations

import asyncio
import errno
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_cases import Served, run, served, state_files, student, tokenizer

from linearize.modeling.text_cache import SavedText
from linearize.serving.conversations import ConversationStore, resume_point
from linearize.serving.state_files import StateFiles

TURNS = ["first question, not short", "second", "third one"]


@pytest.fixture(scope="module")
def model() -> Any:
    return student()


async def conversation(server: Served, turns: list[str], history: list[str]) -> list[tuple[int, int]]:
    """Ask the turns one after the other; prompt tokens and those that were resumed, of each turn."""
    counts = []
    for turn in turns:
        history.append(turn)
        got = await server.chat(*history, max_tokens=12, temperature=0)
        history.append(got["choices"][0]["message"]["content"])
        usage = got["usage"]
        counts.append((usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]))
    return counts


def prompt_of(history: list[str]) -> list[int]:
    roles = ("user", "assistant")
    text = "".join(f"<{roles[i % 2]}> {turn}\n" for i, turn in enumerate(history)) + "<assistant> "
    return list(tokenizer()(text)["input_ids"])


def test_a_state_is_kept_where_no_answer_changes_the_tokens_before_it() -> None:
    assert resume_point([1, 5, 6, 7], {1}) == 1 and resume_point([5, 1, 6, 1], {1}) == 4
    assert resume_point([1, 5, 1, 7, 8], {1, 2}) == 3
    assert resume_point([5, 6], {1}) == 2 and resume_point([1, *[5] * 20], {1}) == 21  # a header is short

    async def work() -> None:
        first, header = prompt_of(["a question"]), tokenizer()("<assistant> ")["input_ids"]
        mark = header[0]
        assert first[-len(header) :] == header and mark not in header[1:]
        async with served(student()) as server:
            server.app.service.engine._special = frozenset([mark])
            await server.complete(first, max_tokens=2, temperature=0, user="a")  # a completion keeps no state on disk
            point = len(first) - len(header) + 1
            # a text that goes on otherwise after the header's first token
            got = await server.complete([*first[:point], *first[:9]], max_tokens=2, temperature=0)
            assert got["usage"]["prompt_tokens_details"]["cached_tokens"] == point
            assert await server.metric("prefilled_tokens_total") == len(first) + 9

    run(work)


@pytest.mark.parametrize("kind", [{}, {"hybrid": True}, {"name": "gated_delta_net"}, {"name": "gla"}])
def test_a_turn_reads_its_own_tokens_alone(kind: dict[str, Any]) -> None:
    model = student(**kind)

    async def work() -> None:
        history: list[str] = []
        fresh_texts = []
        async with served(model) as server:
            counts = await conversation(server, TURNS, history)
            read = await server.metric("prefilled_tokens_total")
        async with served(model, state_memory=0) as server:
            for end in (1, 3, 5):
                got = await server.chat(*history[:end], max_tokens=12, temperature=0)
                assert got["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
                fresh_texts.append(got["choices"][0]["message"]["content"])
        assert history[1::2] == fresh_texts
        assert counts[0][1] == 0
        for turn, (before, (length, resumed)) in enumerate(pairwise(counts), start=1):
            # the end of the answer where its text gives its tokens again, at least the end of the prompt before it
            end = prompt_of(history[: 2 * turn])
            assert before[0] <= resumed <= len(end) and length > resumed
        assert read == sum(length - resumed for length, resumed in counts)

    run(work)


def test_completions_go_on_from_tokens(model: Any) -> None:
    from serve_cases import continuation

    prompt = list(tokenizer()("tokens in, tokens out: the server keeps what it has read")["input_ids"])
    answer = continuation(model, prompt, 10)
    whole = [*prompt, *answer, 40, 41, 42]

    async def work() -> None:
        async with served(model) as server:
            await server.complete(prompt, max_tokens=10, temperature=0)
            got = await server.complete(whole, max_tokens=8, temperature=0)
            again = await server.complete(prompt, max_tokens=10, temperature=0)
            echoed = await server.complete(whole, max_tokens=8, temperature=0, echo=True, logprobs=1)
        # the last token of an answer is not read until the next turn
        assert got["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prompt) + 9
        assert got["choices"][0]["text"] == tokenizer().decode(continuation(model, whole, 8))
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0  # its last token gives the logits
        assert echoed["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert len(echoed["choices"][0]["logprobs"]["tokens"]) == len(whole) + 8

    run(work)


def test_a_server_that_starts_again_finds_its_conversations(model: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"state_disk": 10**8, "state_dir": str(tmp_path)}

    async def work() -> None:
        history: list[str] = []
        async with served(model, **options) as server:
            (first, _), (second, _) = await conversation(server, TURNS[:2], history)
        assert len(state_files(tmp_path)) == 4  # after each prompt, and after each answer
        async with served(model, **options) as server:
            ((third, resumed),) = await conversation(server, TURNS[2:], history)
            read = await server.metric("prefilled_tokens_total")
        assert first < second <= resumed < third and read == third - resumed
        other = student(window=3)
        async with served(other, **options) as server:
            ((_, resumed),) = await conversation(server, ["again"], history)
        assert resumed == 0  # the states are those of another model
        folder = state_files(tmp_path)[0].parent
        assert folder.stat().st_mode & 0o077 == 0  # what people said is for the owner alone

    run(work)


@pytest.mark.parametrize("how", ["cut", "flipped", "header", "empty", "numbers"])
def test_a_damaged_state_is_skipped(model: Any, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"state_disk": 10**8, "state_dir": str(tmp_path)}

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        if how == "flipped":
            data[-5] ^= 4
        elif how == "header":
            data[:8] = b"\xff" * 8
        elif how == "numbers":
            at = data.index(b"next") + 5
            at = next(i for i in range(at, len(data)) if 48 <= data[i] <= 57)
            data[at] = 48 + (data[at] - 47) % 10
        cut = {"cut": len(data) // 2, "empty": 0}.get(how, len(data))
        path.write_bytes(data[:cut])

    async def work() -> None:
        history: list[str] = []
        async with served(model, **options) as server:
            (_, _), (second, _) = await conversation(server, TURNS[:2], history)
        newest = [path for path in state_files(tmp_path) if int(path.name.split("-")[0]) >= second]
        for path in newest:
            damage(path)
        async with served(model, **options) as server:
            ((third, resumed),) = await conversation(server, TURNS[2:], history)
            answer = history.pop()
        async with served(model, state_memory=0) as server:
            got = await server.chat(*history, max_tokens=12, temperature=0)
            due = got["choices"][0]["message"]["content"]
        assert 0 < resumed < second < third  # the state of the turn before serves
        assert due == answer and any(not path.exists() for path in newest)

    run(work)
    printed = capsys.readouterr().err
    assert 1 <= printed.count("damaged") <= 2 and "question" not in printed


def test_a_full_disk_costs_the_state_and_not_the_answer(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    options: dict[str, Any] = {"state_disk": 10**8, "state_dir": str(tmp_path)}

    async def work() -> None:
        history: list[str] = []
        async with served(model, **options) as server:
            with monkeypatch.context() as patched:
                patched.setattr("os.fsync", full)
                before = await conversation(server, TURNS[:2], history)
                while await server.metric("states_dropped") < 4:
                    await asyncio.sleep(0.01)
            assert not list(tmp_path.rglob("*.safetensors*"))
            after = await conversation(server, TURNS[2:], history)
        assert before[1][1] > 0 and after[0][1] > 0  # memory still has them
        assert len(state_files(tmp_path)) == 2  # there is space again

    run(work)
    printed = capsys.readouterr().err
    assert printed.count("No space left on device") == 1


def saved(length: int, numbers: int = 1000, fill: float = 0.0) -> SavedText:
    return SavedText(length, {"x": torch.full((numbers,), fill)}, {"n": 3})


def test_the_least_recently_used_states_leave_memory_first() -> None:
    store = ConversationStore(10_000)
    texts = [[number] * 5 for number in range(3)]
    for text in texts[:2]:
        store.keep(text, saved(5), "memory")
    assert store.find([*texts[0], 9]) is not None
    store.keep(texts[2], saved(5), "memory")
    assert [store.find([*text, 9]) is not None for text in texts] == [True, False, True]
    store.keep([7] * 6, saved(6, 3000), "memory")  # larger than all of it
    assert store.find([7] * 8) is None and store.num_bytes == 8000


def test_the_longest_beginning_is_found_and_never_the_whole_text() -> None:
    store = ConversationStore(10**6)
    for length in (2, 5, 9):
        store.keep(list(range(length)), saved(length), "memory")
    assert [getattr(store.find(list(range(n))), "length", 0) for n in (1, 2, 3, 5, 6, 9, 10, 20)] == [
        0, 0, 2, 2, 5, 5, 9, 9,
    ]  # fmt: skip
    assert store.find([0, 1, 2, 3, 99, 5, 6, 7, 8, 9]).length == 2  # type: ignore[union-attr]


def test_files_are_limited_and_the_oldest_leave_first(tmp_path: Path) -> None:
    files = StateFiles(tmp_path / "states", 13_000)
    for number, name in enumerate("abc"):
        files.write((number, name), saved(number))
        os.utime(files.folder / f"{number}-{name}.safetensors", (number, number))
    assert files.read((0, "a")) is not None  # used now: the oldest is b
    files.write((3, "d"), saved(3))
    assert files.keys() == {(0, "a"), (2, "c"), (3, "d")} and files.num_bytes <= 13_000
    files.write((4, "e"), saved(4, 5000))
    assert (4, "e") not in files.keys()  # noqa: SIM118


def test_a_store_knows_what_its_folder_holds_and_no_more(tmp_path: Path) -> None:
    """Files that make way for others are forgotten; those of another server are found."""
    store = ConversationStore(0, StateFiles(tmp_path / "states", 13_000))
    for number in range(1, 8):
        store.keep([number] * number, saved(number), "disk")
        store.flush()
    store.keep([9] * 9, saved(9, 9000), "disk")  # larger than all of it
    store.flush()
    assert store.files is not None and len(store._on_disk) == 3
    assert store._on_disk == store.files.keys() and dict(store._lengths) == {5: 1, 6: 1, 7: 1}
    other = ConversationStore(0, StateFiles(tmp_path / "states", 13_000))
    other.keep([8] * 8, saved(8), "disk")
    other.flush()
    assert store.find([8] * 9) is None  # not looked for until this one writes
    store.keep([4] * 4, saved(4), "disk")
    store.flush()
    assert store.find([8] * 9) is not None and store.find([5] * 6) is None
    for each in (store, other):
        each.close()


def test_half_written_files_of_killed_servers_go(tmp_path: Path) -> None:
    old, new = (tmp_path / f".3-{name}.safetensors.partial-x" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    StateFiles(tmp_path, 1000)
    assert not old.exists() and new.exists()


def test_states_come_back_bit_by_bit(tmp_path: Path) -> None:
    files = StateFiles(tmp_path, 10**6)
    tensors = {
        "half": torch.randn(3, 5).bfloat16(), "none": torch.zeros(2, 0, 3), "flag": torch.tensor([True, False]),
    }  # fmt: skip
    files.write((7, "k"), SavedText(7, tensors, {"0.next": 7}))
    back = files.read((7, "k"))
    assert back is not None and back.length == 7 and back.numbers == {"0.next": 7}
    for name, x in tensors.items():
        assert torch.equal(x, back.tensors[name]) and x.dtype == back.tensors[name].dtype
