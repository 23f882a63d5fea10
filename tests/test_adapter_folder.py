"""Students as small files: mixers and LoRA alone, pinned to the teacher's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import text
from safetensors.torch import load_file, save_file
from teacher_folder import write_teacher, write_text

import linearize
from linearize.cli.main import main
from linearize.errors import InputError
from linearize.modeling.inspect import inspect_model
from linearize.modeling.io.adapter_folder import MIXERS, PIN

SETTINGS = {
    "data.length": 32, "data.heldout": 3, "plan.mixer.window": 4, "plan.mixer.feature_dim": 6, "plan.layers": [0, 2],
    "stages.0.tokens": 512, "stages.1.tokens": 512, "stages.0.batch": 2, "stages.1.batch": 2,
}  # fmt: skip


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, and its student by the same conversion in both forms."""
    folder = tmp_path_factory.mktemp("adapter")
    write_teacher(folder / "teacher", dtype=request.param)
    write_text(folder / "text.txt", 60)
    for name, adapter_only in (("whole", False), ("adapter", True)):
        linearize.convert(
            folder / "teacher", data=[folder / "text.txt"], out=folder / name, overrides=SETTINGS, device="cpu",
            adapter_only=adapter_only,
        )  # fmt: skip
    return folder


@torch.no_grad()
def test_it_is_the_student_without_the_teachers_weights(both: Path) -> None:
    teacher, whole = both / "teacher", linearize.load(both / "whole", dtype=torch.float32)
    student = linearize.load(teacher, adapter=both / "adapter", dtype=torch.float32)
    ids = text(2, 21) % 40
    expected, logits = whole(ids).logits, student(ids).logits
    low = json.loads((teacher / "config.json").read_text())["dtype"] == "bfloat16"
    assert inspect_model(both / "adapter")["dtype"] == ("bfloat16" if low else "float32")
    assert linearize.load(teacher, adapter=both / "adapter").dtype == (torch.bfloat16 if low else torch.float32)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.1 if low else 2e-5)  # bf16: mixers and LoRA are rounded
    bare = linearize.modeling.LinearizedForCausalLM.from_teacher(student.lm, student.config.mixers())
    assert (bare(ids).logits - expected).abs().max() > 0.2
    saved = {name: x for path in (both / "adapter").rglob("*.safetensors") for name, x in load_file(path).items()}
    assert saved and all(".mixer." in name or ".lora_" in name for name in saved)
    assert {x.dtype for x in saved.values()} == {torch.bfloat16 if low else torch.float32}
    reports = [json.loads((both / name / "report.json").read_text()) for name in ("whole", "adapter")]
    assert reports[0]["student_loss"] == pytest.approx(reports[1]["student_loss"], abs=1e-5)


def test_every_verb_takes_it(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, teacher = str(both / "adapter"), str(both / "teacher")
    common = ["--prompt", "the cat", "--max-new-tokens", "5", "--device", "cpu"]
    assert main(["generate", adapter, *common]) == 0
    first = capsys.readouterr().out
    assert main(["generate", teacher, "--adapter", adapter, *common]) == 0
    assert capsys.readouterr().out == first and len(first) > 9
    assert main(["inspect", adapter, "--json"]) == 0
    assert [row["mixer"] for row in json.loads(capsys.readouterr().out)["layers"]].count("lolcats") == 2
    text_file = str(both / "text.txt")
    assert main(["eval", adapter, "--teacher", teacher, "--data", text_file, "--device", "cpu", "--json"]) == 0


def test_without_a_tokenizer_it_reads_the_teachers(
    both: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(both / "adapter", bare, ignore=shutil.ignore_patterns("tokenizer*", "special_tokens*", "chat_*"))
    command = ["generate", str(both / "teacher"), "--prompt", "the cat", "--max-new-tokens", "5", "--device", "cpu"]
    outputs = []
    for adapter in (both / "adapter", bare):
        assert main([*command, "--adapter", str(adapter)]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and len(outputs[0]) > 9


def test_another_teacher_is_refused(both: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(both / "teacher", other)
    tensors = load_file(other / "model.safetensors")
    linearize.load(other, adapter=both / "adapter")  # a copy serves
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="other weights"):
        linearize.load(other, adapter=both / "adapter")


@pytest.mark.parametrize("fault", ["no pin", "pin", "mixers cut", "mixer gone", "LoRA of another"])
def test_a_damaged_adapter_is_refused(both: Path, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(both / "adapter", folder)
    if fault == "no pin":
        (folder / PIN).unlink()
    elif fault == "pin":
        (folder / PIN).write_text('{"teacher": 3}')
    elif fault == "mixers cut":
        content = (folder / MIXERS).read_bytes()
        (folder / MIXERS).write_bytes(content[: len(content) // 2])
    elif fault == "mixer gone":
        tensors = load_file(folder / MIXERS)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, folder / MIXERS, {"format": "pt"})
    else:
        path = folder / "adapter" / "adapter_model.safetensors"
        save_file({name.replace("layers.0", "layers.7"): x for name, x in load_file(path).items()}, path)
    with pytest.raises(InputError):
        linearize.load(both / "teacher", adapter=folder)


@pytest.mark.parametrize(
    ("recipe", "settings", "stream"),
    [
        ("mamba2-in-llama", {}, False),
        ("window-linear", {"base_weights": "8bit"}, False),
        ("window-linear", {"stages.0.block": "auto"}, True),
        ("draft", {}, False),
        ("window-linear", {"plan.schedule": {"kind": "progressive", "replaced": [0.5, 1.0]}}, False),
    ],
)
def test_what_changes_the_teachers_weights_is_refused_before_any_work(
    recipe: str, settings: dict[str, object], stream: bool, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="adapter"):
        linearize.convert(
            tmp_path / "nothing", data="text.txt", out=tmp_path / "out", recipe=recipe, overrides=settings,
            stream=stream, adapter_only=True,
        )  # fmt: skip
    assert not any(tmp_path.iterdir())
