"""`linearize.convert` from a teacher on disk to a student on disk: complete, repeatable, resumable, or an error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import text
from safetensors.torch import load_file, save_file
from teacher_folder import WORDS, write_teacher, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

import linearize
from linearize.errors import InputError
from linearize.metrics.language_model import loss_only
from linearize.recipes.schema import Recipe, load_recipe
from linearize.training.step import bf16_pays

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "plan": {"mixer": {"name": "lolcats", "window": 4, "feature_dim": 3}, "layers": [0, 2]},
    "data": {"length": 40, "heldout": 0.2},
    "stages": [
        {"name": "attention_transfer", "tokens": 480, "lr": 1e-2, "batch": 3, "evaluate_every": 0.5},
        {"name": "lowrank", "tokens": 480, "lr": 1e-2, "batch": 3, "evaluate_every": 0.5, "loss": "kl", "rank": 2,
         "dropout": 0.1, "train_mixers": True},
    ],
}  # fmt: skip
REPORT = {"teacher_loss", "swap_loss", "stages", "student_loss", "student_kl", "student_top1", "provenance"}
STAGE = {"name", "loss_before", "loss_after", "tokens", "trainable_parameters", "seconds"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher with a tokenizer of single characters, and 30 documents of text."""
    path = tmp_path_factory.mktemp("convert")
    write_teacher(path / "teacher")
    write_text(path / "text.txt")
    (path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return path


def convert(folder: Path, out: Path, **settings: Any) -> Any:
    options = {"data": [folder / "text.txt"], "recipe": folder / "tiny.yaml", "device": "cpu", **settings}
    return linearize.convert(options.pop("teacher", folder / "teacher"), out=out, **options)


@pytest.fixture(scope="module")
def student(folder: Path) -> Path:
    """An unbroken run."""
    convert(folder, folder / "student")
    return folder / "student"


@pytest.fixture(autouse=True)
def _no_plots(student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student above has its plots; every other run here saves the time."""
    for name in ("plot_stages", "plot_layer_error"):
        monkeypatch.setattr(f"linearize.conversion.outputs.{name}", lambda *_: None)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def nothing_at(out: Path) -> bool:
    return not out.exists() and not list(out.parent.glob(f".{out.name}.partial-*"))


def test_the_folder_is_complete(student: Path) -> None:
    names = {p.name for p in student.iterdir()}
    assert {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
        "recipe.yaml", "report.json", "README.md", "plots",
    } <= names  # fmt: skip
    assert not [p for p in student.parent.iterdir() if p.name.startswith(".")], "work folders stay behind"
    config = json.loads((student / "config.json").read_text())
    assert [entry and entry["name"] for entry in config["plan"]] == ["lolcats", None, "lolcats"]
    assert config["plan"][0]["window"] == 4 and config["linearize_version"] == linearize.__version__
    as_run = Recipe.from_data(RECIPE).override({"data.measured_tokens": 65536})  # all: the model is tiny
    assert load_recipe(student / "recipe.yaml").model_dump() == as_run.model_dump()
    card = (student / "README.md").read_text()
    assert all(x in card for x in ("linearize.load", "attention_transfer", "lowrank", "tiny", "teacher"))


def test_the_report_has_the_pinned_keys_and_true_numbers(student: Path, folder: Path) -> None:
    report = json.loads((student / "report.json").read_text())
    assert report.keys() >= REPORT
    assert [stage["name"] for stage in report["stages"]] == ["attention_transfer", "lowrank"]
    assert all(stage.keys() >= STAGE and stage["tokens"] == 480 for stage in report["stages"])
    first, second = report["stages"]
    assert first["loss_before"] == report["swap_loss"] and second["loss_before"] == first["loss_after"]
    assert second["loss_after"] == pytest.approx(report["student_loss"], abs=1e-6)
    maps, factors, ranks = 2 * 6 * 10 * 3, 6, 2 * (2 * (30 + 60) + 2 * (30 + 30))
    assert first["trainable_parameters"] == 2 * (maps + factors)
    assert second["trainable_parameters"] == 2 * (maps + factors) + 3 * ranks
    assert report["student_kl"] > 0 and 0 <= report["student_top1"] <= 1
    assert {"command", "package_version", "libraries", "hardware", "seed"} <= report["provenance"].keys()
    recounted = [loss_only(model, held_out(folder))[0] for model in (teacher(folder), linearize.load(student))]
    assert [report["teacher_loss"], report["student_loss"]] == pytest.approx(recounted, abs=1e-5)
    assert report["swap_loss"] != report["teacher_loss"]


def teacher(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()


def held_out(folder: Path) -> list[dict[str, torch.Tensor]]:
    """The held-out rows as the data layer draws them."""
    from linearize.training.data.loading import document_rows, load_documents, split

    recipe = load_recipe(folder / "tiny.yaml")
    parts = split(
        load_documents([str(folder / "text.txt")], AutoTokenizer.from_pretrained(folder / "teacher")), recipe.data
    )
    return list(document_rows(parts.heldout, recipe.data.length, pad_token_id=1).in_order(8))


def test_it_loads_both_ways_and_writes_text(student: Path) -> None:
    ids = text(2, 30) % 40
    with torch.no_grad():
        logits = [m(ids).logits for m in (linearize.load(student), AutoModelForCausalLM.from_pretrained(student))]
    assert torch.equal(*logits)
    assert {name for name in weights(student) if ".mixer." in name}
    tokenizer = AutoTokenizer.from_pretrained(student)
    out = linearize.load(student).generate(**tokenizer("the cat", return_tensors="pt"), max_new_tokens=5)
    assert tokenizer.decode(out[0]).startswith("the cat")


def test_a_second_run_gives_the_same_weights(student: Path, folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(12345)  # whatever was drawn before must not matter
    model = convert(folder, tmp_path / "again")
    assert same_weights(student, tmp_path / "again")
    assert all(torch.equal(x, weights(student)[n]) for n, x in model.state_dict().items() if n in weights(student))
    convert(folder, tmp_path / "other", overrides={"seed": 1})
    assert not same_weights(student, tmp_path / "other")


def test_an_existing_folder_is_kept_unless_asked(student: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"output folder exists.*--overwrite"):
        convert(folder, out)
    assert [p.name for p in tmp_path.rglob("*")] == ["student", "mine.txt"]
    convert(folder, out, overwrite=True)
    assert same_weights(student, out) and not (out / "mine.txt").exists()


@pytest.mark.parametrize("out", ["teacher", "."])
def test_what_is_read_is_not_replaced(folder: Path, tmp_path: Path, out: str) -> None:
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    with pytest.raises(InputError, match=r"is or contains .*teacher, which is an input"):
        convert(folder, tmp_path / out, teacher=tmp_path / "teacher", overwrite=True)
    assert (tmp_path / "teacher" / "config.json").is_file()


class Killed(BaseException):
    """As final as a signal, but the test survives it."""


class KillAt:
    """A progress that kills the run in this stage after this step."""

    def __init__(self, stage: str, step: int, kill: Any = None) -> None:
        self.stage, self.at, self.name, self.kill = stage, step, "", kill
        self.seen: list[tuple[str, int]] = []

    def begin(self, name: str, step: int, steps: int) -> None:
        self.name = name
        self.seen.append((name, step))

    def step(self, step: int, **_: Any) -> None:
        if self.stage in self.name and step == self.at:
            if self.kill:
                self.kill()
            raise Killed

    def heldout(self, step: int, loss: float, best: float) -> None:
        """Nothing to see."""

    def end(self) -> None:
        """Nothing to see."""


@pytest.mark.parametrize(("stage", "step"), [("attention_transfer", 1), ("lowrank", 3)])
def test_killed_and_started_again_it_ends_with_the_same_weights(
    student: Path, folder: Path, tmp_path: Path, stage: str, step: int
) -> None:
    out = tmp_path / "student"
    with pytest.raises(Killed):
        convert(folder, out, progress=KillAt(stage, step))
    assert nothing_at(out) and (tmp_path / ".student.run").is_dir()
    second = KillAt("nowhere", 0)
    convert(folder, out, progress=second)
    assert same_weights(student, out)
    assert [p.name for p in tmp_path.iterdir()] == ["student"]
    resumed = {"attention_transfer": ("0-attention_transfer", 2), "lowrank": ("1-lowrank", 2)}[stage]
    assert (resumed in second.seen) == (step == 3), "it was not the checkpoint that it went on from"
    reports = [json.loads((path / "report.json").read_text()) for path in (student, out)]
    losses = [[stage["loss_after"] for stage in report["stages"]] for report in reports]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_real_kill_leaves_nothing_and_the_same_command_continues(student: Path, folder: Path, tmp_path: Path) -> None:
    out, script, tests = tmp_path / "student", tmp_path / "run.py", Path(__file__).parent
    script.write_text(
        "import os, signal, sys\nfrom pathlib import Path\n"
        f"sys.path[:0] = {[str(tests), str(tests / 'support')]!r}\n"
        "from test_convert import KillAt, convert\n"
        "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"convert(Path({str(folder)!r}), Path({str(out)!r}), progress=KillAt('lowrank', 3, kill))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert nothing_at(out)
    convert(folder, out)
    assert same_weights(student, out)


def test_a_full_disk_leaves_nothing_and_no_training_is_lost(
    student: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("linearize.conversion.outputs.write_report", full)
        with pytest.raises(OSError, match="No space left"):
            convert(folder, tmp_path / "student")
    assert nothing_at(tmp_path / "student")
    again = KillAt("", -1)
    convert(folder, tmp_path / "student", progress=again)
    assert again.seen == [], "stages that had ended were run again"
    assert same_weights(student, tmp_path / "student")


def test_what_another_recipe_left_behind_is_not_used(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        convert(folder, tmp_path / "student", progress=KillAt("lowrank", 3))
    for overrides in ({"stages.0.tokens": 0}, {"seed": 3}, {"plan.mixer.window": 5}, {"stages.1.lr": 0.5}):
        with pytest.raises(InputError, match="belongs to another run"):
            convert(folder, tmp_path / "student", overrides=overrides)
    assert nothing_at(tmp_path / "student")


def test_no_tokens_skip_a_stage(folder: Path, tmp_path: Path) -> None:
    model = convert(folder, tmp_path / "first", overrides={"stages.1.tokens": 0})
    report = json.loads((tmp_path / "first" / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["attention_transfer"]
    original = load_file(folder / "teacher" / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[f"lm.{name}"], value) for name, value in original.items())
    convert(folder, tmp_path / "bare", overrides={"stages.0.tokens": 0, "stages.1.tokens": 0})
    report = json.loads((tmp_path / "bare" / "report.json").read_text())
    assert report["stages"] == [] and report["swap_loss"] == pytest.approx(report["student_loss"], abs=1e-6)


def preferences(path: Path) -> Path:
    """Pairs of answers, the chosen ones of a kind."""
    rows = [
        {"prompt": WORDS[n % 8], "chosen": f"{WORDS[(n + 1) % 8]}. {n}", "rejected": f"{n} 000 {WORDS[(n + 3) % 8]}"}
        for n in range(12)
    ]
    path.write_text(json.dumps(rows))
    return path


def test_a_stage_with_its_own_loop_and_data(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DPO after a stage of the common loop; killed in between, it ends with the same weights."""
    dpo = {"name": "dpo", "data": str(preferences(tmp_path / "pairs.json")), "lr": 1e-2, "batch": 4, "epochs": 1,
           "beta": 0.5, "chat_template": "plain", "length": 100, "precision": "bf16"}  # fmt: skip
    recipe = Recipe.from_data(RECIPE | {"stages": [RECIPE["stages"][0], dpo]})
    convert(folder, tmp_path / "whole", recipe=recipe)
    assert ("stage 1: this CPU has no bf16 units" in capsys.readouterr().err) != bf16_pays(torch.device("cpu"))
    report = json.loads((tmp_path / "whole" / "report.json").read_text())
    first, second = report["stages"]
    assert (second["name"], second["details"]["steps"]) == ("dpo", 3) and second["tokens"] > 0
    assert second["loss_before"] == first["loss_after"] and second["loss_after"] != second["loss_before"]
    assert any("margin" in name for name in second["details"]["metrics"])
    as_run = yaml.safe_load((tmp_path / "whole" / "recipe.yaml").read_text())
    assert as_run["stages"][1]["length"] == 64, "cut to the teacher's context as in any other stage"
    assert second["details"]["data"] == dpo["data"] and dpo["data"] in (tmp_path / "whole" / "README.md").read_text()
    with pytest.raises(Killed):
        convert(folder, tmp_path / "broken", recipe=recipe, progress=KillAt("dpo", 2))
    convert(folder, tmp_path / "broken", recipe=recipe)
    assert same_weights(tmp_path / "whole", tmp_path / "broken")


def test_a_conversion_on_the_teachers_own_answers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{word} {n}"}) + "\n" for n, word in enumerate(WORDS)))
    settings = {"data.pseudo_max_new_tokens": 20, "data.length": 20, "data.answer_only": True, "stages.1.tokens": 0}
    for name in ("first", "second"):
        convert(folder, tmp_path / name, data=[f"pseudo:{prompts}"], overrides=settings)
    assert same_weights(tmp_path / "first", tmp_path / "second")
    assert len(list((tmp_path / "cache").rglob("*.jsonl"))) == 1, "the second run reads what the first one wrote"


def test_preferences_that_cannot_be_used_are_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(
        json.dumps([{"prompt": "the cat", "chosen": "sat"}, {"prompt": "a", "chosen": "b", "rejected": "c"}])
    )
    stage = {"name": "dpo", "data": str(path), "lr": 1e-2, "chat_template": "plain"}
    recipe = Recipe.from_data(RECIPE | {"stages": [RECIPE["stages"][0], stage]})
    with pytest.raises(InputError, match=r"rejected"):
        convert(folder, tmp_path / "student", recipe=recipe, progress=KillAt("", 1))
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.json"]


def test_adapters_beside_the_weights(student: Path, folder: Path, tmp_path: Path) -> None:
    """The report speaks of the student that is loaded, adapters included."""
    model = convert(folder, tmp_path / "kept", overrides={"stages.1.merge": False})
    assert (tmp_path / "kept" / "adapter" / "adapter_model.safetensors").is_file()
    report = json.loads((tmp_path / "kept" / "report.json").read_text())
    assert loss_only(model, held_out(folder))[0] == pytest.approx(report["student_loss"], abs=1e-5)
    assert report["student_loss"] == pytest.approx(json.loads((student / "report.json").read_text())["student_loss"])
    ids = text(2, 30) % 40
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, linearize.load(student)(ids).logits, rtol=0, atol=1e-4)
    original = load_file(folder / "teacher" / "model.safetensors")
    assert all(torch.equal(weights(tmp_path / "kept")[f"lm.{name}"], value) for name, value in original.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overrides": {"plan.layers": [0, 3]}}, r"layer 3 given, the model has 3 layers"),
        ({"overrides": {"plan.mixer.window": -1}}, r"plan\.mixer\.window.*-1"),
        ({"overrides": {"plan.mixer.feature_dim": 0}}, r"plan\.mixer\.feature_dim.*0"),
        ({"overrides": {"plan.mixer.name": "sliding_window", "plan.mixer.window": 0}}, r"plan\.mixer\.window"),
        ({"overrides": {"plan.mixer.windw": 3}}, r"windw.*window"),
        ({"overrides": {"plan.mixer.name": "lolcat"}}, r"lolcat.*lolcats"),
        ({"overrides": {"stages.2.tokens": 3}}, r"stages"),
        ({"recipe": "lolcat"}, r"unknown recipe 'lolcat'.*lolcats"),
        ({"recipe": "nowhere.yaml"}, r"nowhere\.yaml: no such file"),
        ({"overrides": {"data.length": 65}}, r"65.*64"),
        ({"data": ["nowhere.txt"]}, r"nowhere\.txt"),
        ({"data": []}, r"no data given"),
        ({"device": "abacus"}, r"abacus"),
    ],
)
def test_bad_settings_are_refused_in_one_line(folder: Path, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        convert(folder, tmp_path / "student", **settings)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def broken_teacher(folder: Path, path: Path, how: str) -> Path:
    if how == "missing":
        return path
    shutil.copytree(folder / "teacher", path)
    tensors = load_file(path / "model.safetensors")
    if how == "no config":
        (path / "config.json").unlink()
    elif how == "pickle":
        (path / "model.safetensors").unlink()
        torch.save(tensors, path / "pytorch_model.bin")
    elif how == "damaged":
        (path / "model.safetensors").write_bytes(b"1234567890" * 9)
    elif how == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (path / name).unlink()
    elif how == "no json":
        (path / "config.json").write_text("{")
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "is not a model folder"),
        ("no config", "no config.json"),
        ("pickle", "pickle.*safetensors"),
        ("damaged", r"model\.safetensors is damaged"),
        ("no tokenizer", r"tokenizer\.json is missing"),
        ("no json", r"config\.json: not valid JSON"),
    ],
)
def test_a_folder_that_is_no_teacher_is_refused(folder: Path, tmp_path: Path, how: str, message: str) -> None:
    path = broken_teacher(folder, tmp_path / "teacher", how)
    with pytest.raises(InputError, match=message) as caught:
        convert(folder, tmp_path / "student", teacher=path)
    assert "\n" not in str(caught.value) and not (tmp_path / "student").exists()


def test_a_student_is_no_teacher(student: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a student already"):
        convert(folder, tmp_path / "student", teacher=student)
    with pytest.raises(InputError, match="not a student"):
        linearize.load(folder / "teacher")


def edited(student: Path, path: Path, change: Any) -> Path:
    shutil.copytree(student, path)
    config, tensors = json.loads((path / "config.json").read_text()), weights(path)
    change(config, tensors)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda config, tensors: config["plan"][0].update(feature_dim=5),
        lambda config, tensors: config["plan"][0].update(name="lolcat"),
        lambda config, tensors: config["plan"][0].update(windw=5),
        lambda config, tensors: config["plan"].pop(),
        lambda config, tensors: config["plan"].__setitem__(1, config["plan"][0]),
        lambda config, tensors: config["plan"].__setitem__(0, None),
        lambda config, tensors: tensors.pop("lm.model.layers.2.self_attn.mixer.window_factor_H"),
        lambda config, tensors: tensors.pop("lm.model.layers.1.mlp.up_proj.weight"),
        lambda config, tensors: tensors.update(more=torch.ones(3)),
    ],
    ids=[
        "feature_dim",
        "name",
        "key",
        "short plan",
        "mixer more",
        "mixer less",
        "no factor",
        "no up_proj",
        "tensor more",
    ],
)
def test_weights_that_do_not_fit_the_plan_are_refused(student: Path, tmp_path: Path, change: Any) -> None:
    path = edited(student, tmp_path / "edited", change)
    with pytest.raises(InputError) as caught:
        linearize.load(path)
    assert "\n" not in str(caught.value), str(caught.value)
    with pytest.raises((ValueError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(path)


def test_damaged_student_weights_are_refused(student: Path, tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"1234567890" * 9)
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        linearize.load(tmp_path / "damaged")


def test_pickled_student_weights_are_refused(student: Path, tmp_path: Path) -> None:
    path = tmp_path / "pickled"
    shutil.copytree(student, path)
    torch.save(weights(path), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="pickle"):
        linearize.load(path)
    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(path)


def test_an_output_that_cannot_be_a_folder_is_refused_before_training(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "student"):
        with pytest.raises(InputError, match=r"output folder|not a folder|no folder"):
            convert(folder, out, progress=KillAt("", 1))
