"""Folders for mlx-lm: what does not fit is refused; where mlx-lm is installed (`make test-mlx`), logits and text are
the student's."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from models import mixer, student_of, text, tiny
from safetensors.torch import load_file

from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.export import export_student

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("LINEARIZE_MLX_PYTHON", ROOT / ".venv-mlx" / "bin" / "python"))
needs_mlx = pytest.mark.skipif(not PYTHON.exists(), reason="make test-mlx brings mlx-lm")
T = 45
CASES: dict[str, tuple[str, dict[str, Any], list[Any]]] = {
    "llama-published": ("llama", {}, [mixer("lolcats"), None, mixer("lolcats", affine=True)]),
    "llama-gain-shared": (
        "llama", {"tie_word_embeddings": True},
        [
            mixer("lolcats", feature_map="gain", shift="shared", num_sinks=sinks, window=window)
            for sinks, window in ((1, 4), (3, 5), (0, 8))
        ],
    ),
    "qwen2-biases": ("qwen2", {}, [mixer("lolcats", feature_map="t2r"), mixer("lolcats", feature_map="exp"), None]),
    "qwen3-norms": (
        "qwen3", {},
        [
            mixer("lolcats", feature_map="elu"),
            mixer("sliding_window", window=5, window_shape="terraced", num_sinks=2),
            mixer("lolcats", window=2),
        ],
    ),
    "llama3-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
        [mixer("lolcats"), mixer("lolcats"), None],
    ),
}  # fmt: skip


def built(case: str) -> LinearizedForCausalLM:
    family, changes, plan = CASES[case]
    return student_of(tiny(family, attention="sdpa", **changes), plan)


def run(folder: Path, **request: Any) -> dict[str, Any]:
    command = [str(PYTHON), str(ROOT / "tests" / "support" / "mlx_run.py"), str(folder), json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


@needs_mlx
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_mlx_lm_gives_the_students_logits_and_text(case: str, tmp_path: Path) -> None:
    student, ids = built(case), text(2, T)
    folder = export_student(student, "mlx", tmp_path / "out")
    expected = student(ids).logits
    greedy = student.generate(ids[:1], max_new_tokens=24, do_sample=False, eos_token_id=-1)[0, T:].tolist()
    for parts in ([T], [7, 1, 1, 20, 16]):
        result = run(folder, ids=ids.tolist(), parts=parts, new=24)
        torch.testing.assert_close(torch.tensor(result["logits"]), expected, rtol=0, atol=2e-4)
        assert result["written"] == result["again"] == greedy
    window = student(ids, branch="window").logits
    assert (window - expected).abs().max() > 1e-2


@needs_mlx
def test_the_state_does_not_grow(tmp_path: Path) -> None:
    folder = export_student(built("llama-gain-shared"), "mlx", tmp_path / "out")
    ids = text(1, 160).tolist()
    short, long = (run(folder, ids=[ids[0][:n]], parts=[n], new=2)["state"] for n in (40, 160))
    assert short == long and all(short)


def test_the_folder_holds_what_mlx_lm_reads(tmp_path: Path) -> None:
    folder = export_student(built("llama-gain-shared"), "mlx", tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_file"] == "linearized_mlx.py" and (folder / "linearized_mlx.py").is_file()
    assert [layer["window"] for layer in config["linearize_layers"]] == [4, 5, 8]
    assert (config["model_type"], config["head_dim"], config["tie_word_embeddings"]) == ("llama", 10, True)
    names = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in names and "model.layers.2.self_attn.mixer.feature_k.gain_HD" in names
    assert "mlx_lm.server --model out --trust-remote-code" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "plan", "words"),
    [
        ("llama", [mixer("gla"), None, None], "layer 0 holds gla"),
        ("llama", [mixer("lolcats", window_shape="sliding"), None, None], "window of layer 0 is sliding"),
        ("llama", [None, mixer("lolcats", store=3), None], "layer 1 has an exact store"),
        ("gemma2", [mixer("lolcats"), mixer("lolcats"), None], "families"),
        ("mistral", [mixer("lolcats", window=4), None, None], "sees only a window"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(family: str, plan: list[Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{words}.*use --to hf"):
        export_student(student_of(tiny(family), plan), "mlx", tmp_path / "out")
    assert not list(tmp_path.iterdir())
