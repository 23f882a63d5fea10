"""What takes long says what it is: lines of phases, and how many tokens a conversion measures."""

from __future__ import annotations

import io
import time

import pytest
import torch

from linearize.conversion.text import measured_tokens, with_measured_tokens
from linearize.phases import phase, shown
from linearize.recipes import load_recipe
from linearize.training.data.documents import Document
from linearize.training.data.loading import shortened


def test_a_long_phase_says_what_it_is_how_far_it_is_and_how_long_it_took() -> None:
    lines = io.StringIO()
    with shown(lines, quiet=0.05, every=0.1), phase("counting", 10, "rows") as advance:
        for _ in range(5):
            time.sleep(0.06)
            advance(1)
    printed = lines.getvalue().splitlines()
    assert len(printed) >= 3 and all("counting" in line for line in printed)
    assert any("of 10 rows" in line and "left" in line for line in printed)


def test_a_short_phase_an_inner_one_and_one_that_nobody_watches_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    lines = io.StringIO()
    with shown(lines, quiet=5.0), phase("outer"), phase("inner"):
        pass
    with shown(lines, quiet=0.02, every=0.02), phase("outer"), phase("inner"):
        time.sleep(0.1)
    assert "outer" in lines.getvalue() and "inner" not in lines.getvalue()
    with phase("alone"):
        time.sleep(0.05)
    assert capfd.readouterr() == ("", "")


def test_a_phase_that_fails_ends_and_hides_nothing() -> None:
    with shown(io.StringIO(), quiet=0.01), pytest.raises(ZeroDivisionError), phase("failing"):
        raise ZeroDivisionError
    with shown(lines := io.StringIO(), quiet=0.01), phase("next"):
        time.sleep(0.05)
    assert "next" in lines.getvalue()


@pytest.mark.parametrize(
    ("tokens", "parameters", "device", "expected"),
    [
        (500_000, 134_515_008, "cpu", 2230),  # two cores measure that in a quarter of a minute
        (500_000, 134_515_008, "cuda", 7812),
        (20_000, 260_032, "cpu", 9614),  # small models: no less than what takes a few seconds
        (100_000_000, 8_000_000_000, "cuda", 65_536),
        (100_000_000, 8_000_000_000, "cpu", 256),
    ],
)
def test_what_is_measured_follows_what_is_trained(tokens: int, parameters: int, device: str, expected: int) -> None:
    recipe = load_recipe("window-linear").override({"stages.0.tokens": tokens, "stages.1.tokens": tokens})
    assert measured_tokens(recipe, parameters, device) == expected
    assert measured_tokens(recipe.override({"data.measured_tokens": 777}), parameters, device) == 777


@pytest.mark.parametrize(
    ("length", "settings", "warns"),
    [
        (4096, {}, True),
        (256, {}, False),
        (4096, {"data.measured_tokens": 300}, False),
        (4096, {"stages.0.keep_best": False, "stages.1.keep_best": False}, False),
        (256, {"stages.1.length": 4096}, True),
    ],
)
def test_weights_chosen_on_less_than_a_row_are_warned_of(
    length: int, settings: dict[str, object], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = load_recipe("window-linear").override({"data.length": length, **settings})
    teacher = torch.nn.Linear(1, 270_000_000, bias=False, device="meta")  # 1,111 tokens on a CPU
    measured = with_measured_tokens(recipe, teacher, torch.device("cpu")).data.measured_tokens
    assert measured == settings.get("data.measured_tokens", 1111)
    assert any("1,111" in line and "4,096" in line for line in caplog.messages) == warns == bool(caplog.messages)


def documents(*lengths: int) -> list[Document]:
    return [Document(list(range(length)), [1] * length) for length in lengths]


def test_measured_text_is_the_beginning_of_the_held_out_documents() -> None:
    assert [len(d) for d in shortened(documents(9000), 2230, 1024)] == [2048]
    assert [len(d) for d in shortened(documents(9000, 8000, 7000), 2230, 1024)] == [1024, 1024]
    assert [len(d) for d in shortened(documents(200, 300, 100, 500), 650, 1024)] == [200, 300, 100]
    assert [len(d) for d in shortened(documents(200, 300), 9000, 1024)] == [200, 300]
    assert [len(d) for d in shortened(documents(5000), 300, 1024)] == [300]
    (first, *_) = shortened(documents(50, 60), 30, 16)
    assert first.tokens == list(range(16)) and len(first.loss_mask) == 16
