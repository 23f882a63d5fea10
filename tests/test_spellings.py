"""The same teacher, data and folders under other spellings of their paths: a stopped run continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from teacher_folder import write_teacher, write_text
from torch import equal

import linearize
from linearize.conversion.request import read_request
from linearize.recipes.schema import Recipe
from linearize.storage.files import real_name
from linearize.training.stages import STAGES
from linearize.training.step import Stepper

PLAN: dict[str, Any] = {"mixer": {"name": "lolcats", "window": 4, "feature_dim": 6}}
TRANSFER: dict[str, Any] = {"name": "attention_transfer", "tokens": 600, "lr": 1e-2, "batch": 2, "evaluate_every": 2}
DISTILL: dict[str, Any] = {"name": "distill", "tokens": 600, "lr": 1e-3, "batch": 2, "kl": 1.0, "evaluate_every": 2}


class Stopped(BaseException):
    """As final as a signal, but the test survives it."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `teacher`, `other`, `text.txt` and links to them, the working and home folder of the test."""
    for name, seed in (("teacher", 5), ("other", 5)):
        (tmp_path / name).mkdir()
        write_teacher(tmp_path / name, hidden_size=30 if name == "teacher" else 42, num_hidden_layers=seed - 2)
        (tmp_path / f"{name}-link").symlink_to(tmp_path / name)
    write_text(tmp_path / "text.txt")
    (tmp_path / "text-link.txt").symlink_to(tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def spellings(place: Path, name: str) -> list[str]:
    stem, _, ending = name.partition(".")
    link = f"{stem}-link" + (f".{ending}" if ending else "")
    return [str(place / name), f"./{name}", f"{place}//{name}", f"~/{name}", str(place / link)]


def recipe(other: str, **block: Any) -> Recipe:
    stages = [{**TRANSFER, **block}, {**DISTILL, "teacher": other}]
    return Recipe.from_data({"plan": PLAN, "data": {"length": 48, "heldout": 3}, "stages": stages})


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: list[int], most: int | None) -> None:
    """Steps are noted in `steps`; after `most` of them the run is stopped."""
    original, first = Stepper.step, len(steps)

    def counted(self: Stepper, *args: Any, **named: Any) -> Any:
        if most is not None and len(steps) - first == most:
            raise Stopped
        steps.append(named["number"])
        return original(self, *args, **named)

    monkeypatch.setattr(Stepper, "step", counted)


@pytest.mark.slow
def test_a_stopped_run_continues(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers, others, texts = (spellings(place, name) for name in ("teacher", "other", "text.txt"))
    whole: list[int] = []
    with monkeypatch.context() as patch:
        stop_after(patch, whole, None)
        linearize.convert(teachers[0], data=[texts[0]], out="whole", recipe=recipe(others[0]), device="cpu")
    steps: list[int] = []
    for i, (teacher, other, text) in enumerate(zip(teachers, others, texts, strict=True)):
        with monkeypatch.context() as patch:
            stop_after(patch, steps, None if i == 4 else 3)
            try:
                linearize.convert(teacher, data=[text], out="stopped", recipe=recipe(other), device="cpu")
            except Stopped:
                continue
    assert len(whole) == 14 and len(whole) <= len(steps) < 2 * len(whole)
    expected, actual = (load_file(place / name / "model.safetensors") for name in ("whole", "stopped"))
    assert expected.keys() == actual.keys() and all(equal(expected[name], actual[name]) for name in expected)


@pytest.mark.parametrize("stream", [False, True])
def test_blocks_trained_before_are_taken(place: Path, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers, others, texts = (spellings(place, name) for name in ("teacher", "other", "text.txt"))
    chosen = {"out": "student", "device": "cpu"}
    if stream:
        with monkeypatch.context() as patch:
            stop_after(patch, [], 9)
            with pytest.raises(Stopped):
                linearize.convert(
                    teachers[0], data=[texts[0]], recipe=recipe(others[0], block=1), stream=True, **chosen
                )
    else:
        linearize.convert(teachers[0], blocks="0", data=[texts[0]], recipe=recipe(others[0], block=1), **chosen)
    parts = sorted((place / ".student.run").glob("*/results/*"))
    times = [part.stat().st_mtime_ns for part in parts]
    assert parts
    with monkeypatch.context() as patch:
        stop_after(patch, [], 2)
        with pytest.raises(Stopped):
            linearize.convert(teachers[4], data=[texts[3]], recipe=recipe(others[1], block=1), stream=stream, **chosen)
    assert [part.stat().st_mtime_ns for part in parts] == times


def test_a_run_that_was_stopped_at_its_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student has its name already: nothing is trained again, and nothing has to be overwritten."""

    def stop(*args: Any) -> None:
        raise Stopped

    teachers, others, texts = (spellings(place, name) for name in ("teacher", "other", "text.txt"))
    with monkeypatch.context() as patch:
        patch.setattr("linearize.conversion.api.discard", stop)
        with pytest.raises(Stopped):
            linearize.convert(teachers[0], data=[texts[0]], out="student", recipe=recipe(others[0]), device="cpu")
    with monkeypatch.context() as patch:
        stop_after(patch, [], 0)
        linearize.convert(teachers[1], data=[texts[4]], out="student", recipe=recipe(others[3]), device="cpu")
    assert not (place / ".student.run").exists()


def test_names_that_are_no_places(place: Path) -> None:
    assert {real_name(name) for name in spellings(place, "teacher")} == {str(place / "teacher")}
    assert real_name("someone/model") == "someone/model" and real_name("self") == "self"
    rest: Any = dict.fromkeys(("overrides", "blocks", "memory", "disk", "device"))
    rest |= {"out": "o", "stream": False, "overwrite": False, "trust_remote_code": False, "adapter_only": False}
    asked = [
        read_request(teacher, data=[f"pseudo:{text}", "self"], recipe=recipe(other), **rest)
        for teacher, text, other in zip(*(spellings(place, n) for n in ("teacher", "text.txt", "other")), strict=True)
    ]
    assert all(request.identity == asked[0].identity for request in asked)
    assert asked[0].identity["data"] == [f"pseudo:{place / 'text.txt'}", "self"]


def test_every_stage_that_names_a_place_says_so() -> None:
    """A field that names a file or a model is recognised by what is there."""
    for config in STAGES.values():
        named = {field for field in config.model_fields if field in ("teacher", "data", "start")}
        assert named == set(config.places), config
