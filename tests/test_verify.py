"""`linearize verify`: an engine that writes what the student writes passes, a folder with other weights does not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from models import mixer, student_of, tiny
from safetensors.torch import load_file, save_file
from test_export_mlx import PYTHON, needs_mlx
from test_vllm import PYTHON as VLLM_PYTHON
from test_vllm import WIDE, needs_vllm

from linearize.cli.main import main
from linearize.errors import InputError
from linearize.modeling import load
from linearize.modeling.export import export_student
from linearize.modeling.export.prompts import read_prompts
from linearize.modeling.export.verify import (
    NEW,
    PROMPTS,
    ROUNDING,
    Parting,
    Verification,
    _compared,
    _partings,
    verify,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    student = student_of(tiny(attention="sdpa"), [mixer("lolcats"), None, mixer("lolcats", num_sinks=1)])
    student.save_pretrained(folder / "student")
    for to in ("hf", "mlx"):
        export_student(student, to, folder / to)
    return folder


def damaged(folder: Path, out: Path, weight: str = "self_attn.o_proj.weight") -> Path:
    """The same folder with one mixer's map a little different."""
    out.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(out / "model.safetensors")
    name = next(name for name in tensors if name.endswith(weight))
    tensors[name] = tensors[name] * 1.3
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_transformers_writes_what_the_student_writes(folders: Path, tmp_path: Path) -> None:
    result = verify(folders / "hf", folders / "student", "transformers", trust_remote_code=True)
    assert result.passed and result.equal == result.tokens == NEW * len(PROMPTS) and result.first is None
    assert 0 < result.difference < 1e-3 and result.version.startswith("5.")
    wrong = verify(
        damaged(folders / "hf", tmp_path / "bad"), folders / "student", "transformers", trust_remote_code=True
    )
    assert not wrong.passed and wrong.difference > wrong.allowed and wrong.equal < wrong.tokens
    assert wrong.first is not None


@needs_mlx
def test_mlx_lm_writes_what_the_student_writes(folders: Path, tmp_path: Path) -> None:
    result = verify(folders / "mlx", folders / "student", "mlx", python=PYTHON, trust_remote_code=True)
    assert result.passed and result.tokens == NEW * len(PROMPTS) and result.difference < 1e-3
    bad = damaged(folders / "mlx", tmp_path / "bad")
    assert not verify(bad, folders / "student", "mlx", python=PYTHON, trust_remote_code=True).passed


@needs_vllm
@pytest.mark.slow
def test_vllm_writes_what_the_student_writes(tmp_path: Path) -> None:
    student = tmp_path / "student"
    student_of(tiny(attention="sdpa", **WIDE), [mixer("lolcats"), None, mixer("mamba2")]).save_pretrained(student)
    result = verify(student, student, "vllm", python=VLLM_PYTHON)
    assert result.passed and result.tokens == NEW * len(PROMPTS) and result.difference < 1e-3
    bad = damaged(student, tmp_path / "bad", "layers.1.self_attn.o_proj.weight")
    assert not verify(bad, student, "vllm", python=VLLM_PYTHON).passed


@pytest.mark.slow
def test_the_command_exits_1_where_they_differ(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, bad = str(folders / "student"), damaged(folders / "hf", tmp_path / "bad")
    common = ["--student", student, "--trust-remote-code", "--json"]
    assert main(["verify", str(folders / "hf"), *common]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    assert main(["verify", str(bad), *common]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False
    written = ["export", student, "--to", "hf", "--out", str(tmp_path / "new"), "--verify", "transformers"]
    assert main([*written, "--trust-remote-code"]) == 0
    assert "transformers" in capsys.readouterr().out


def test_what_cannot_be_verified_is_one_line(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = str(folders / "student")
    cases = {
        "--trust-remote-code": [str(folders / "hf"), "--student", student],
        "engine 'sglang'": [str(folders / "hf"), "--student", student, "--with", "sglang"],
        "no config.json": [str(tmp_path), "--student", student],
        "cannot run": [str(folders / "hf"), "--student", student, "--python", "/nowhere/python", "--trust-remote-code"],
    }
    for words, arguments in cases.items():
        assert main(["verify", *arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert words in error[-1], words
    assert main(["export", student, "--to", "hf", "--out", str(tmp_path / "x"), "--python", sys.executable]) == 2
    assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match=r"has no mlx \(.*pip install mlx-lm"):
        verify(folders / "mlx", student, "mlx", python=sys.executable, trust_remote_code=True)


def test_random_prompts_where_there_is_no_tokenizer(folders: Path) -> None:
    from linearize.modeling.export.verify import _rows

    rows = _rows(str(folders / "student"), load(folders / "student"))
    assert [len(row) for row in rows] == [4, 13, 22, 31, 40] and rows == _rows("nowhere", load(folders / "student"))
    assert torch.tensor(rows[-1]).max() < 61


def test_texts_part_from_those_of_generate_where_a_token_differs(folders: Path) -> None:
    student = load(folders / "student")
    rows = [[5, 9, 3, 7], [11, 2, 8]]
    texts = []
    for row in rows:
        ids = torch.tensor([row])
        out = student.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0)
        texts.append(out[0, len(row) :].tolist())
    answer = {"rows": [{"tokens": text} for text in texts]}
    assert _partings(student, rows, answer) == []
    other = (texts[1][4] + 1) % 61
    answer["rows"][1] = {"tokens": [*texts[1][:4], other, *texts[1][5:]]}
    (parting,) = _partings(student, rows, answer)
    assert (parting.prompt, parting.place) == (1, 4)
    assert (parting.engine_token, parting.generated_token) == (other, texts[1][4])
    read = torch.tensor([[*rows[1], *texts[1][:4]]])
    scores = student(read, use_cache=False).logits[0, -1].detach().log_softmax(-1)
    assert parting.gap == pytest.approx(float(scores.max() - scores[other]), abs=1e-5) and not parting.is_tie


@pytest.mark.parametrize("logprobs", [[-1.0, float("nan")], [None, -1.0], []])
def test_an_engine_that_gives_no_numbers_is_refused(folders: Path, logprobs: list[float | None]) -> None:
    answer = {"version": "1", "rows": [{"tokens": [7, 3][: len(logprobs)], "logprobs": logprobs}]}
    with pytest.raises(InputError, match="prompt 1"):
        _compared(load(folders / "student"), "vllm", "f", "float32", [[5, 9]], answer)


def test_rounding_decides_more_ties_in_16_bits(folders: Path) -> None:
    student = load(folders / "student")
    answer = {"rows": [{"tokens": [60]}]}
    for dtype, rounding in ROUNDING.items():
        (parting,) = _partings(student, [[5, 9, 3]], answer, rounding)
        assert parting.rounding == rounding and parting.is_tie == (parting.gap < rounding), dtype
    with pytest.raises(InputError, match="empty"):
        verify(folders / "student", folders / "student", "transformers", prompts=[])


@pytest.mark.parametrize(("gap", "passed"), [(9e-5, True), (1.2e-4, False)])
def test_only_a_tie_may_part_texts(gap: float, passed: bool) -> None:
    parting = Parting(prompt=0, place=3, engine_token=7, generated_token=9, gap=gap)
    result = Verification(
        engine="vllm", version="1", folder="f", prompts=1, tokens=5, equal=5, difference=1e-5, allowed=0.01, first=None,
        same_texts=0, partings=[parting],
    )  # fmt: skip
    assert result.passed is passed


def test_prompts_are_taken_in_turn_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"turns": ["one", "two"]}\n\n{"prompt": "three"}\n', "utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "fo\u2028ur"}\n', "utf-8")
    (tmp_path / "c.txt").write_text("five\nsix\n\nseven\n", "utf-8")
    assert read_prompts([tmp_path]) == ["one", "fo\u2028ur", "three"]
    assert read_prompts([tmp_path / "b.jsonl", tmp_path / "c.txt"], 2) == ["fo\u2028ur", "five\nsix"]
    (tmp_path / "bad.jsonl").write_text('{"turns": ["one"]}\n{"turns": []}\n', "utf-8")
    with pytest.raises(InputError, match=r"bad\.jsonl, line 2: has no prompt"):
        read_prompts([tmp_path / "bad.jsonl"])
    (tmp_path / "none.txt").write_text("\n\n", "utf-8")
    with pytest.raises(InputError, match="no prompt in there"):
        read_prompts([tmp_path / "none.txt"])


def test_llama_cpp_needs_its_converter(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = folders / "student"
    monkeypatch.delenv("LINEARIZE_LLAMA_CPP", raising=False)
    with pytest.raises(InputError, match="set LINEARIZE_LLAMA_CPP"):
        verify(student, student, "llama.cpp")
    monkeypatch.setenv("LINEARIZE_LLAMA_CPP", str(tmp_path))
    with pytest.raises(InputError, match=r"has no convert_hf_to_gguf\.py"):
        verify(student, student, "llama.cpp")
    script = (
        "import sys; open(sys.argv[3], 'w').close(); sys.exit('boom' if '--no-mtp' in sys.argv else 'unknown model')"
    )
    (tmp_path / "convert_hf_to_gguf.py").write_text(script, "utf-8")
    with pytest.raises(InputError, match=r"does not take .*: unknown model"):
        verify(student, student, "llama.cpp")
