"""`linearize inspect --backends`: what it prints is what runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import left_padded, mixer, student_of, text, tiny

from linearize.cli.main import main
from linearize.errors import InputError
from linearize.mixers import MIXERS
from linearize.modeling.inspect import inspect_backends
from linearize.ops.dispatch import Call, Dispatcher
from linearize.ops.window_linear.decoder import WindowDecoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of each mixer, as a config alone."""
    made = tmp_path_factory.mktemp("students")
    for name in MIXERS:
        student_of(tiny(), [mixer(name), None, mixer(name)]).save_pretrained(made / name)
    return made


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Operation and backend of every call."""
    seen: list[tuple[str, str]] = []
    real = Dispatcher.run

    def run(self: Dispatcher, call: Call, invoke: Any) -> Any:
        seen.append((self.operation, self.choice(call)[0]))
        return real(self, call, invoke)

    step = WindowDecoder.step

    def decode(self: WindowDecoder, *inputs: torch.Tensor) -> torch.Tensor:
        seen.append(("window_linear", "decoder"))
        return step(self, *inputs)

    monkeypatch.setattr(Dispatcher, "run", run)
    monkeypatch.setattr(WindowDecoder, "step", decode)
    yield seen


def printed_backends(path: Path, call: str, **options: Any) -> list[tuple[str, str]]:
    return [
        (row["operation"], row["backend"])
        for row in inspect_backends(path, **options)["backends"]
        if row["call"] == call
    ]


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_what_is_printed_is_what_runs(name: str, folder: Path, ran: list[tuple[str, str]]) -> None:
    student = student_of(tiny(), [mixer(name), None, None])
    ids = text(1, 50)
    with torch.no_grad():
        cache = student(ids, use_cache=True).past_key_values
    assert set(ran) == set(printed_backends(folder / name, "prefill", device="cpu"))
    ran.clear()
    with torch.no_grad():
        student(ids[:, :1], past_key_values=cache)
    assert ran == printed_backends(folder / name, "decode", device="cpu")
    ran.clear()
    student.train()(ids, use_cache=False).logits.sum().backward()
    assert set(ran) == set(printed_backends(folder / name, "training", device="cpu"))


def test_a_call_that_the_table_does_not_take_gets_another_form(folder: Path, ran: list[tuple[str, str]]) -> None:
    student = student_of(tiny(), [mixer("lolcats"), None, None])
    ids, mask = left_padded(text(2, 9), [9, 4])
    with torch.no_grad():
        cache = student(ids, attention_mask=mask, use_cache=True).past_key_values
        ran.clear()
        student(ids[:, :1], attention_mask=torch.cat([mask, mask[:, :1] * 0 + 1], 1), past_key_values=cache)
    assert ran != printed_backends(folder / "lolcats", "decode", device="cpu")  # rows of unequal length are not `step`


def test_a_gpu_has_forms_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.ops.triton.has_triton", lambda: True)
    cuda = {"device": "cuda"}
    assert printed_backends(folder / "lolcats", "training", **cuda) == [("window_linear", "triton_chunks")]
    assert printed_backends(folder / "mamba2", "decode", **cuda) == [("layer", "triton")]
    monkeypatch.setattr("linearize.ops.triton.has_triton", lambda: False)
    rows = inspect_backends(folder / "lolcats", **cuda)["backends"]
    assert all("triton is not installed" in row["why"] for row in rows)


def test_bad_input_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny().save_pretrained(tmp_path / "teacher")
    with pytest.raises(InputError, match="is no student"):
        inspect_backends(tmp_path / "teacher")
    with pytest.raises(InputError, match="cpu or cuda"):
        inspect_backends(folder / "mamba", device="tpu")
    capsys.readouterr()
    assert main(["inspect", str(folder / "mamba"), "--backends", "--sensitivity"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["inspect", str(folder / "mamba"), "--backends", "--json"]) == 0
