"""The comparison with published code: its table, its refusals, and its measuring, without the peers' repositories."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.peers import lolcats, mamba_in_llama, measure, options, ours, table, text
from benchmarks.peers.repository import teacher_folder
from torch import Tensor

import linearize

TEACHER = Path(linearize.__file__).parent / "demo" / "teacher"
SIZES = [
    "--step-lengths", "32", "--train-tokens", "96", "--train-length", "48", "--heldout-rows", "2",
    "--heldout-length", "64", "--contexts", "32", "64", "--new-tokens", "3", "--threads", "1", "--layers", "2",
]  # fmt: skip


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A text of 101 training tokens and three held-out rows of 65."""
    numbers = np.random.default_rng(0)
    path = tmp_path / "tokens.npz"
    np.savez(path, train=numbers.integers(3, 90, 101, np.int32), heldout=numbers.integers(3, 90, (3, 65), np.int32))
    return path


def document(method: str, **parts: Any) -> dict[str, Any]:
    """A result file."""
    origin = {
        "hardware": {"cpu": "C", "threads": 2, "gpus": []}, "commit": "0123456789", "repository": None, "load": 0.25,
    }  # fmt: skip
    setting = {"teacher": "T", "layers": None, "dtype": "float32", "text_digest": "abc"}
    return {"method": method, "setting": setting, "provenance": origin, **parts}


def put(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content))


def rows(page: str, title: str, method: str) -> list[str]:
    """The cells of a method in the table of this title."""
    body = page.split(f"{title}:\n")[1]
    line = next(line for line in body.splitlines() if line.startswith(f"| {table.TITLES[method]} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_page_has_the_tables_of_the_committed_results() -> None:
    page = table.README.read_text("utf-8")
    assert table.MARKS[0] + table.render(table.load(table.FOLDER)) + table.MARKS[1] in page


def test_cells_are_computed_from_the_files_and_the_others_say_so(tmp_path: Path) -> None:
    loss = {
        "teacher": [2.0, 3.0, 4.0], "before": [4.0, 6.0, 8.0], "after": [2.5, 3.5, 5.0], "tokens": 300, "seconds": 1.5,
        "peak_bytes": 1_234_000_000,
    }  # fmt: skip
    steps = {"512": {"seconds": 2.0, "peak_bytes": None}, "100": {"seconds": 4.0, "peak_bytes": 7_000_000_000}}
    prefill = {"seconds": 8.0, "peak_bytes": 2_500_000_000}
    contexts = {"2048": {"prefill": prefill, "decode": {"seconds": 0.5, "tokens": 16}}}
    put(tmp_path, "a", document("lolcats-published", loss=loss, steps=steps))
    put(tmp_path, "b", document("lolcats-published", contexts=contexts))
    put(tmp_path, "c", document("lolcats", differences={"attention": 2.5e-7}))
    page, none = table.render(table.load(tmp_path)), table.MISSING
    name = "lolcats-published"
    assert rows(page, "Training step, tokens per second, by its tokens", name) == ["25", none, none, "256", none, none]
    assert rows(page, "Training step, peak memory in GB, by its tokens", name) == ["7.00", none, none, none, none, none]
    assert rows(page, "Training run", name) == ["300", "200", "1.23", "3.000 (0.58)", "0.667 (0.17)"]
    assert rows(page, "Prefill, seconds, by context", name) == [none, "8", none, none]
    assert rows(page, "Prefill, peak memory in GB, by context", name) == [none, "2.50", none, none]
    assert rows(page, "Decoding, ms per token, by context", name) == [none, "31.2", none, none]
    assert set(rows(page, "Prefill, seconds, by context", "lolcats")) == {none}
    assert "2.5e-07" in page and "0123456" in page


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (document("lolcats", steps={}), "steps"),
        (document("pegasus"), "pegasus"),
        (document("mamba") | {"setting": document("mamba")["setting"] | {"text_digest": "xyz"}}, "xyz"),
        (document("mamba") | {"setting": document("mamba")["setting"] | {"layers": 3}}, "3 layers"),
    ],
    ids=["twice", "unknown", "text", "layers"],
)
def test_results_that_cannot_be_compared_are_refused(
    other: dict[str, Any], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, "a", document("lolcats", steps={}))
    put(tmp_path, "b", other)
    with pytest.raises(SystemExit) as stopped:
        table.main(["--folder", str(tmp_path)])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("program", "arguments", "named"),
    [
        (ours, ["lolcats", "--train-tokens", "102"], "102"),
        (ours, ["lolcats", "--window", "16", "--contexts", "99"], "102"),
        (ours, ["lolcats", "--window", "16", "--step-lengths", "24"], "24"),
        (ours, ["lolcats", "--window", "32"], "32"),
        (ours, ["mamba", "--train-length", "97"], "97"),
        (ours, ["mamba", "--heldout-length", "66"], "66"),
        (ours, ["mamba", "--repeats", "0"], "--repeats"),
        (ours, ["mamba", "--window", "16"], "--window"),
        (ours, ["window-linear", "--window", "16", "--exchange", "x.npz"], "--exchange"),
        (ours, ["teacher", "--measure", "loss"], "loss"),
        (ours, ["mamba", "--text", "nowhere.npz"], "nowhere.npz"),
        (lolcats, ["--window", "16", "--repo", "nowhere"], "nowhere"),
        (mamba_in_llama, ["--repo", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    program: Any, arguments: list[str], named: str, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        program.main(["--teacher", str(TEACHER), "--text", str(tokens), *SIZES, *arguments])
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


class Uniform(measure.Method):
    """Every token alike at first, then the first token alone; notes what is asked of it."""

    def __init__(self) -> None:
        self.converted = self.trained = False
        self.calls: list[tuple[str, int]] = []

    def convert(self) -> None:
        self.converted = True

    def logits(self, ids_BT: Tensor) -> Tensor:
        logits = torch.zeros(*ids_BT.shape, 100)
        logits[..., 0] = 5.0 if self.converted and not self.trained else 0.0
        return logits

    def step(self, ids_BT: Tensor) -> None:
        self.calls.append(("step", ids_BT.shape[1]))

    def train(self, rows_RT: Tensor) -> list[float]:
        self.trained = True
        return [float(n) for n in rows_RT.shape]

    def prefill(self, ids_BT: Tensor) -> Any:
        self.calls.append(("prefill", ids_BT.shape[1]))
        return ids_BT

    def decode(self, cache: Any, ids_B1: Tensor) -> Any:
        assert ids_B1.shape == (1, 1)
        return torch.cat([cache, ids_B1], dim=1)


def test_teacher_student_and_trained_student_are_measured_in_turn(tokens: Path) -> None:
    chosen = options.parser("").parse_args(["--teacher", "T", "--text", str(tokens), *SIZES, "--repeats", "2"])
    method = Uniform()
    result = measure.measure(method, chosen, options.Text.load(tokens))
    wrong = math.log(99 + math.exp(5.0))
    assert result["loss"]["teacher"] == pytest.approx([math.log(100)] * 2)
    assert result["loss"]["before"] == pytest.approx([wrong] * 2)
    assert result["loss"]["after"] == pytest.approx([math.log(100)] * 2)
    assert (result["loss"]["training_losses"], result["loss"]["tokens"]) == ([2.0, 48.0], 96)
    assert method.calls == [("step", 32)] * 3 + [("prefill", 32)] * 3 + [("prefill", 64)] * 2
    assert result["contexts"]["64"]["decode"]["tokens"] == 3


@pytest.mark.skipif(not measure.CLEAR_PEAK.exists(), reason="the system does not say its peak memory")
def test_peak_memory_is_that_of_the_call(tokens: Path) -> None:
    before = measure.timed(lambda: None)["peak_bytes"]
    large = measure.timed(lambda: float(torch.ones(2**26).sum()))["peak_bytes"]
    after = measure.timed(lambda: None)["peak_bytes"]
    assert large - before > 2**27 and large - after > 2**27


def test_a_teacher_is_written_as_older_libraries_read_it(tmp_path: Path) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 7, "dtype": "bfloat16"}
    config["rope_parameters"] = {"rope_theta": 123.0, "rope_type": "default"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    folder = teacher_folder(tmp_path, 3)
    written = json.loads((folder / "config.json").read_text())
    assert (written["rope_theta"], written["num_hidden_layers"], written["torch_dtype"]) == (123.0, 3, "float32")
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(ValueError, match="8"):
        teacher_folder(tmp_path, 8)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    with pytest.raises(ValueError, match="qwen3"):
        teacher_folder(tmp_path, None)


def test_tokens_are_those_of_the_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stories = [f"Once upon a time there was a dog called {name}. " * 9 for name in ("Tim", "Lily", "Sam", "Mia")]
    data, out = tmp_path / "data.jsonl", tmp_path / "tokens.npz"
    data.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    arguments = ["--teacher", str(TEACHER), "--data", str(data), "--out", str(out), "--heldout-rows", "2"]
    text.main([*arguments, "--heldout-length", "33", "--train-tokens", "50"])
    with np.load(out) as arrays:
        assert arrays["heldout"].shape == (2, 33) and arrays["train"].shape == (50,)
        assert not (arrays["heldout"][0] == arrays["heldout"][1]).all()
    with pytest.raises(SystemExit):
        text.main([*arguments, "--heldout-length", "33000", "--train-tokens", "50"])
    assert "--train-tokens" in capsys.readouterr().err.splitlines()[-1]


def quadratic(q: Tensor, k: Tensor, v: Tensor, maps: dict[str, Tensor], window: int) -> Tensor:
    """Terraced window and linear attention as a matrix, from the paper's equation; keys as many as queries."""
    at = torch.arange(q.shape[2])
    causal = at[:, None] >= at
    near = causal & (at[:, None] // window - at // window <= 1)

    def features(x: Tensor, weight: Tensor) -> Tensor:
        z = torch.einsum("bhtd,hdf->bhtf", x, weight)
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], -1)

    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~near, -math.inf)
    weights = torch.sigmoid(maps["window_factor"]) * (scores - scores.amax(-1, keepdim=True)).exp()
    linear = features(q, maps["feature_q"]) @ features(k, maps["feature_k"]).mT
    weights = weights + linear * (causal & ~near)
    return weights @ v / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("wrong", [False, True])
def test_attention_that_differs_from_the_published_one_is_an_error(wrong: bool, tokens: Path, tmp_path: Path) -> None:
    made = options.parser("")
    options.window_options(made)
    sizes = ["--window", "8", "--feature-dim", "5"]
    chosen = made.parse_args(["--teacher", str(TEACHER), "--text", str(tokens), *SIZES, *sizes])
    student = ours.Student("lolcats", chosen)
    student.convert()
    generator = torch.Generator().manual_seed(1)
    arrays: dict[str, Tensor] = {"ids": torch.arange(3, 51)[None]}
    for number, mixer in student.model.mixers().items():
        shape = mixer.shape
        group, heads, dim = shape.group, shape.num_heads, shape.head_dim
        maps = {name: torch.randn(heads, dim, 5, generator=generator) for name in ("feature_q", "feature_k")}
        maps["window_factor"] = torch.randn(1, heads, 1, 1, generator=generator)
        q = torch.randn(1, heads, 48, dim, generator=generator)
        k, v = (
            torch.randn(1, heads // group, 48, dim, generator=generator).repeat_interleave(group, 1) for _ in range(2)
        )
        y = quadratic(q, k, v, maps, 16 if wrong else 8)
        arrays |= {f"{name}_{number}": x for name, x in ({"q": q, "k": k, "v": v, "y": y} | maps).items()}
        with torch.no_grad():
            ours._load(mixer, arrays, number)
    with torch.no_grad():
        arrays["logits"] = student.logits(arrays["ids"])
    np.savez(tmp_path / "exchange.npz", **{name: x.numpy() for name, x in arrays.items()})
    if wrong:
        with pytest.raises(RuntimeError):
            student.compare(tmp_path / "exchange.npz")
    else:
        differences = student.compare(tmp_path / "exchange.npz")
        assert differences["attention"] < 1e-5 and differences["logits"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("method", ours.METHODS)
def test_our_methods_run_at_tiny_sizes(method: str, tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    window = ["--window", "16"] if method in ours.WINDOWED else []
    ours.main([method, "--teacher", str(TEACHER), "--text", str(tokens), *SIZES, *window, "--out", str(out)])
    results = table.load(tmp_path)[method]
    assert set(results["contexts"]) == {"32", "64"}
    if method != "teacher":
        assert len(results["loss"]["training_losses"]) == 2 and results["steps"]["32"]["seconds"] > 0
        assert results["loss"]["after"] != results["loss"]["before"] != results["loss"]["teacher"]
