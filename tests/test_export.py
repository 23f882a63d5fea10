"""Exported folders equal their students in plain transformers, where linearize cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import LAYERS, left_padded, mixer, student_of, text, tiny
from packaging.version import Version
from safetensors.torch import load_file, save_file

from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.export import EXPORTS, export_student, qwen3_5
from linearize.modeling.export.granite_hybrid import GROUPED_NORMS
from linearize.modeling.io.student_folder import save_student

TOKENS, PROMPT, TOLERANCE = 21, 5, 1e-4
M, G, S = "mamba2", "gated_delta_net", None
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 64}
AFTER: dict[str, Any] = {"repeat": "after"}
GROUPED = Version(transformers.__version__) >= Version(GROUPED_NORMS)
needs_grouped_norms = pytest.mark.skipif(not GROUPED, reason=f"needs transformers {GROUPED_NORMS}")
CASES: dict[str, tuple[str, str, list[str | None], dict[str, Any], dict[str, Any]]] = {
    "granite-llama": ("granite-hybrid", "llama", [M, S, M], {}, {}),
    "granite-llama-after": (
        "granite-hybrid", "llama", [S, M, M], {"tie_word_embeddings": True, "rope_parameters": LLAMA3}, AFTER,
    ),
    "granite-llama-biases": ("granite-hybrid", "llama", [M, S, M], {"attention_bias": True}, AFTER),
    "granite-softmax": ("granite-hybrid", "llama", [S, S, S], {"attention_bias": True}, {}),
    "granite-mistral": ("granite-hybrid", "mistral", [M, M, S], {"sliding_window": None, "num_key_value_heads": 2},
                        {"conv_taps": 3}),
    "granite-qwen2": ("granite-hybrid", "qwen2", [M, S, S], {}, {}),
    "granite-granite": ("granite-hybrid", "granite", [S, M, S], {}, {}),
    "granite-smollm3": ("granite-hybrid", "smollm3", [M, S, M], {}, {}),  # the kept layer has no rotary positions
    "qwen-qwen3": ("qwen3.5", "qwen3", [G, S, G], {}, {}),
    "qwen-qwen3-after": (
        "qwen3.5", "qwen3", [S, G, S], {"tie_word_embeddings": True, "rope_parameters": YARN}, AFTER,
    ),
    "qwen-softmax": ("qwen3.5", "qwen3", [S, S, S], {"attention_bias": True}, {}),
}  # fmt: skip
BIASED = ("granite-llama-biases", "granite-qwen2")  # transformers' layer lets padding's bias into its convolution
SCRIPT = """
import json, sys
sys.modules["linearize"] = None
try:
    import linearize
    raise SystemExit("linearize can be imported")
except ImportError:
    pass
import torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
found = {}
for folder in sorted(p for p in Path(sys.argv[1]).iterdir() if (p / "model").is_dir()):
    model, info = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    given = load_file(folder / "expected.safetensors")
    ids, prompt = given["ids"], int(sys.argv[2])
    with torch.no_grad():
        prefill = model(ids).logits
        padded = model(given["padded"], attention_mask=given["mask"], position_ids=given["positions"]).logits
        out = model(ids[:, :prompt], use_cache=True)
        steps = [out.logits]
        for t in range(prompt, ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
    live = given["mask"].bool()
    found[folder.name] = {
        "class": type(model).__name__,
        "prefill": float((prefill - given["logits"]).abs().max()),
        "decode": float((torch.cat(steps, 1) - given["logits"]).abs().max()),
        "padded": float((padded - given["padded_logits"])[live].abs().max()),
        "generated": torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), given["generated"]),
        "wrong_keys": sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]),
    }
print(json.dumps(found))
"""


def runs_here(case: str) -> bool:
    """Whether the installed transformers computes the exported layers: Granite's Mamba-2 norms by group since 5.23."""
    to, _, names, *_ = CASES[case]
    return to != "granite-hybrid" or M not in names or GROUPED


def built(case: str) -> LinearizedForCausalLM:
    _, family, names, changes, settings = CASES[case]
    plan = [None if name is None else mixer(name, **settings) for name in names]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return student_of(tiny(family, **changes), plan)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case, exported here and run in a process without linearize."""
    root = tmp_path_factory.mktemp("exports")
    ids = text(2, TOKENS)
    padded, mask = left_padded(ids, [TOKENS, TOKENS - 8])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for case, (to, *_) in CASES.items():
        if not runs_here(case):
            continue
        student = built(case)
        with torch.no_grad():
            logits, padded_logits = student(ids).logits, student(padded, attention_mask=mask).logits
            generated = student.generate(ids, max_new_tokens=3, do_sample=False)
        assert logits.std() > 0.1
        export_student(student, to, root / case / "model")
        inputs = {"ids": ids, "padded": padded, "mask": mask, "positions": positions, "logits": logits}
        inputs |= {"padded_logits": padded_logits, "generated": generated}
        save_file(inputs, root / case / "expected.safetensors")
    command = [sys.executable, "-c", SCRIPT, str(root), str(PROMPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_gives_the_student(plain: dict[str, dict[str, Any]], case: str) -> None:
    if not runs_here(case):
        pytest.skip(f"needs transformers {GROUPED_NORMS}")
    result = plain[case]
    native = {"granite-hybrid": "GraniteMoeHybridForCausalLM", "qwen3.5": "Qwen3_5ForCausalLM"}
    assert result["class"] == native[CASES[case][0]]
    assert not result["wrong_keys"]
    assert result["prefill"] < TOLERANCE
    assert result["decode"] < TOLERANCE
    assert result["generated"]
    if case not in BIASED:
        assert result["padded"] < TOLERANCE


REFUSALS: list[tuple[str, str, dict[str, Any], list[str | None], str]] = [
    ("granite-hybrid", "llama", {}, ["lolcats", S, "lolcats"],
     "layers 0, 2 hold lolcats, granite-hybrid takes mamba2 and softmax: use --to hf"),
    ("qwen3.5", "llama", {}, [S, M, S], "layer 1 holds mamba2, qwen3.5 takes gated_delta_net and softmax: "
     "use --to granite-hybrid"),
    ("granite-hybrid", "qwen3", {}, [G, S, G], "layers 0, 2 hold gated_delta_net, .*: use --to qwen3.5"),
    ("granite-hybrid", "mistral", {}, [M, S, M], "softmax of layer 1 sees only a window of 5 tokens, .*: use --to hf"),
    ("granite-hybrid", "qwen3", {}, [M, S, M], "teachers of the families llama, .*, not qwen3: use --to hf"),
    ("qwen3.5", "llama", {}, [G, S, G], "teachers of the families qwen3, not llama: use --to hf"),
    ("granite-hybrid", "llama", {}, [M, M, M], "no layer keeps softmax, .*: use --to hf"),
    ("qwen3.5", "qwen3", {"attention_bias": True}, [G, S, G], "no biases in its delta layers, layers 0, 2 have"),
    ("granite-hybrid", "smollm3", {}, [S, S, M], "some kept layers have rotary positions and some have none"),
    ("granite-hybrid", "llama", {"mlp_bias": True}, [M, S, M], "no biases in its MLP, the teacher has: use --to hf"),
    ("granite-hybrid", "llama", {"hidden_act": "gelu"}, [M, S, M], "SiLU in its MLP, the teacher gelu"),
    ("granite-hybrid", "llama", {"head_dim": 8}, [M, S, M], "multiple of the width, here 48 and 30: use --to hf"),
    ("granite-hybrid", "gpt2", {}, [S, S, S], "not gpt2: use --to hf"),
]  # fmt: skip


@pytest.mark.parametrize(("to", "family", "changes", "names", "reason"), REFUSALS)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, to: str, family: str, changes: dict[str, Any], names: list[str | None], reason: str
) -> None:
    if not GROUPED:  # Granite's layers are not to be had there
        reason = reason.replace("use --to granite-hybrid", "use --to hf")
    plan = [None if name is None else mixer(name) for name in names]
    student = LinearizedForCausalLM.from_teacher(tiny(family, **changes), plan)
    with pytest.raises(InputError, match=reason) as caught:
        export_student(student, to, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "family", "name"), [("granite-hybrid", "llama", M), ("qwen3.5", "qwen3", G)])
def test_layers_of_two_sizes_are_refused(tmp_path: Path, to: str, family: str, name: str) -> None:
    student = LinearizedForCausalLM.from_teacher(tiny(family), [mixer(name, conv_taps=3), None, mixer(name)])
    with pytest.raises(InputError, match="of one size, layers 0, 2 differ: use --to hf"):
        export_student(student, to, tmp_path / "out")


def test_unknown_target_and_taken_folder_are_refused(tmp_path: Path) -> None:
    student = built("granite-softmax")
    with pytest.raises(InputError, match="did you mean 'granite-hybrid'"):
        export_student(student, "granite", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("kept")
    with pytest.raises(InputError, match="output folder exists"):
        export_student(student, "granite-hybrid", tmp_path / "out")
    assert (tmp_path / "out" / "precious.txt").read_text() == "kept"
    assert export_student(student, "granite-hybrid", tmp_path / "out", overwrite=True) == tmp_path / "out"
    assert not (tmp_path / "out" / "precious.txt").exists()
    with pytest.raises(InputError, match="not a model folder"):
        export_student(tmp_path / "nowhere", "hf", tmp_path / "other")


def test_the_student_is_not_replaced_by_its_export(tmp_path: Path) -> None:
    built("granite-softmax").save_pretrained(tmp_path / "student")
    before = (tmp_path / "student" / "config.json").read_bytes()
    for out in (tmp_path / "student", tmp_path):
        with pytest.raises(InputError, match=r"is or contains .*student, which is an input"):
            export_student(tmp_path / "student", "granite-hybrid", out, overwrite=True)
    assert (tmp_path / "student" / "config.json").read_bytes() == before


def test_a_folder_that_is_not_the_student_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen3_5, "centred", lambda weight: weight)
    with pytest.raises(InputError, match=r"logits differ from the student's by .*use --to hf"):
        export_student(built("qwen-softmax"), "qwen3.5", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@needs_grouped_norms
def test_the_config_speaks_to_engines_too(tmp_path: Path) -> None:
    student = built("granite-llama-after")
    student.generation_config.max_new_tokens = 7
    folder = export_student(student, "granite-hybrid", tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["layer_types"] == ["attention", "mamba", "mamba"]
    assert config["rope_theta"] == 500.0
    assert config["rope_scaling"]["factor"] == 8.0
    assert (config["mamba_n_groups"], config["mamba_n_heads"], config["mamba_d_state"]) == (6, 6, 10)
    assert config["num_local_experts"] == 0
    assert config["time_step_limit"] == [0.0, 1e30]
    assert config["tie_word_embeddings"] is True
    assert "auto_map" not in config
    assert "linearize" not in json.dumps(config)
    assert json.loads((folder / "generation_config.json").read_text())["max_new_tokens"] == 7
    content = (folder / "README.md").read_text()
    assert "mamba2: layers 1, 2" in content
    assert "llama.cpp" in content
    assert "vLLM and SGLang take the head size" in content  # 6 heads of 10 are not the width of 30
    assert "stops at an assertion" not in content  # 6 heads of 10 are twice the width of 30


def test_where_the_kinds_of_layers_can_be_counted_the_config_says_how(tmp_path: Path) -> None:
    """mlx-lm reads `full_attention_interval` in the place of `layer_types`."""
    delta, teacher = mixer("gated_delta_net"), tiny("qwen3", num_hidden_layers=4)
    intervals = {}
    for kept in ((1, 3), (3,), (0, 3), (2,)):
        student = student_of(teacher, [None if layer in kept else delta for layer in range(4)])
        folder = export_student(student, "qwen3.5", tmp_path / "-".join(map(str, kept)))
        written = json.loads((folder / "config.json").read_text())
        warned = "mlx-lm takes the kinds of layers" in (folder / "README.md").read_text()
        intervals[kept] = None if warned else written["full_attention_interval"]
    assert intervals == {(1, 3): 2, (3,): 4, (0, 3): None, (2,): 3}


@needs_grouped_norms
def test_bf16_keeps_decay_and_step_size_in_fp32(tmp_path: Path) -> None:
    teacher = tiny("llama", num_hidden_layers=LAYERS).to(torch.bfloat16)
    student = student_of(teacher, [mixer(M), None, mixer(M)])
    folder = export_student(student, "granite-hybrid", tmp_path / "out")
    state = load_file(folder / "model.safetensors")
    assert state["model.layers.0.mamba.A_log"].dtype == torch.float32
    assert state["model.layers.0.mamba.in_proj.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(state["model.layers.0.mamba.A_log"], student.mixers()[0].A_log.detach(), rtol=0, atol=0)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@needs_grouped_norms
def test_a_folder_is_exported_with_its_tokenizer(tmp_path: Path, shared_dir: Path) -> None:
    from transformers import AutoTokenizer

    from linearize.modeling.io.teacher import load_teacher

    teacher, tokenizer = load_teacher(shared_dir / "teachers" / "stories260k")
    plan = [mixer(M) if i % 2 else None for i in range(teacher.config.num_hidden_layers)]
    (tmp_path / "student").mkdir()
    save_student(LinearizedForCausalLM.from_teacher(teacher, plan), tokenizer, tmp_path / "student")
    for to in ("granite-hybrid", "hf"):
        folder = export_student(tmp_path / "student", to, tmp_path / to)
        content = "Once upon a time, Zoë had a ball.\n\n  It was red!"
        assert AutoTokenizer.from_pretrained(folder)(content)["input_ids"] == tokenizer(content)["input_ids"]
        assert "**Tokenizer.**" not in (folder / "README.md").read_text()


def test_the_table_names_the_command_lines_targets() -> None:
    assert list(EXPORTS) == ["granite-hybrid", "qwen3.5", "hf", "mlx"]
