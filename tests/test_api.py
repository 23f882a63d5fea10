"""The public names, models in memory as teachers, and plans in all their forms."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import text, tiny
from teacher_folder import write_teacher, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

import linearize
from linearize.errors import InputError
from linearize.metrics.report import read_report
from linearize.modeling import LinearizedForCausalLM
from linearize.recipes.schema import load_recipe

LOLCATS = {"name": "lolcats", "window": 4, "feature_dim": 3}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "plan": {"mixer": LOLCATS},
    "data": {"length": 40, "heldout": 0.2},
    "stages": [{"name": "distill", "tokens": 240, "lr": 1e-3, "batch": 3, "train": "all"}],
}
NAMES = """
import json, sys
import linearize
before = set(sys.modules)
import linearize.recipes.schema
listed = list(linearize.recipes())
kinds = {name: type(getattr(linearize, name)).__name__ for name in linearize.__all__}
print(json.dumps({"first": sorted(n for n in before if n.startswith("linearize.")), "recipes": listed, "kinds": kinds}))
"""


def test_names_are_there_and_nothing_is_imported_before_they_are_used() -> None:
    done = subprocess.run([sys.executable, "-c", NAMES], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert not {"linearize.conversion", "linearize.recipes", "linearize.decoding"} & set(result["first"])
    assert len(result["kinds"]) == len(linearize.__all__) >= 25
    assert result["recipes"] == sorted(result["recipes"]) and "lolcats" in result["recipes"]
    assert set(linearize.__all__) <= set(dir(linearize))
    with pytest.raises(AttributeError, match="convrt"):
        linearize.convrt  # noqa: B018


@torch.no_grad()
def test_a_student_in_memory_shares_its_weights() -> None:
    teacher = tiny("llama", num_hidden_layers=3).train()
    ids, before = text(2, 17), {name: id(p) for name, p in teacher.named_parameters()}
    logits = teacher(ids).logits
    student = linearize.convert_model(teacher, {"mixer": LOLCATS, "layers": [0, -1]}, name="mine")
    shared = {id(p) for p in student.parameters()}
    assert {name: id(p) for name, p in teacher.named_parameters()} == before and set(before.values()) <= shared
    assert teacher.training and torch.equal(teacher(ids).logits, logits) and not student.training
    assert [entry and entry["name"] for entry in student.config.plan] == ["lolcats", None, "lolcats"]
    assert student.config.teacher_name == "mine"
    assert not torch.allclose(student(ids).logits, logits, atol=1e-3)


def test_all_forms_of_a_plan_say_the_same() -> None:
    teacher = tiny("llama", num_hidden_layers=3)
    mixer = linearize.LolcatsConfig(**LOLCATS)
    recipe = load_recipe("lolcats").override({f"plan.mixer.{key}": value for key, value in LOLCATS.items()})
    forms = [linearize.Plan(mixer=mixer), recipe, {"mixer": LOLCATS}, mixer, [mixer] * 3]
    state = torch.random.get_rng_state()
    students = [linearize.convert_model(teacher, form, seed=5) for form in forms]  # type: ignore[arg-type]
    assert torch.equal(torch.random.get_rng_state(), state)
    first = students[0].state_dict()
    for other in students[1:]:
        assert other.config.plan == students[0].config.plan
        assert all(torch.equal(value, first[name]) for name, value in other.state_dict().items())
    by_name = linearize.convert_model(tiny("llama", num_hidden_layers=8), "mamba2-in-llama-progressive")
    assert {entry["name"] for entry in by_name.config.plan if entry} == {"mamba2"}
    draft = linearize.convert_model(teacher, {"depth": [0, 2]})
    assert len(draft.config.plan) == 2


@pytest.mark.parametrize(
    ("plan", "word"),
    [
        ({"mixer": {"name": "lolcat"}}, "lolcats"),
        ({"mixer": LOLCATS, "layrs": "all"}, "plan.layers"),
        ({"mixer": LOLCATS, "layers": {"keep": 0.4, "select": "sensitivity"}}, "needs text"),
        ({"mixer": LOLCATS, "heads": {"keep": 1}}, "needs text"),
        ({"mixer": {"name": "mamba2", "initialise": "calibrate"}}, "initialise=calibrate"),
        ("lolcat", "lolcats"),
        ([None, None], "one mixer"),
        ([None, "lolcats", None], "a mixer's config, or None"),
        (None, "NoneType given"),
    ],
)
def test_plans_that_do_not_fit(plan: Any, word: str) -> None:
    with pytest.raises(InputError, match=word):
        linearize.convert_model(tiny("llama", num_hidden_layers=3), plan)


def test_other_models_are_refused() -> None:
    with pytest.raises(InputError, match="Linear"):
        linearize.convert_model(torch.nn.Linear(2, 2), "lolcats")  # type: ignore[arg-type]
    student = linearize.convert_model(tiny("llama", num_hidden_layers=1), {"mixer": LOLCATS})
    with pytest.raises(InputError, match="convert_layers"):
        linearize.convert_model(student, "lolcats")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("api")
    write_teacher(path / "teacher", num_hidden_layers=2)
    write_text(path / "text.txt")
    (path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return path


def convert(folder: Path, teacher: Any, out: Path, **options: Any) -> Any:
    chosen = {"data": [folder / "text.txt"], "recipe": str(folder / "tiny.yaml"), "out": out, **options}
    return linearize.convert(teacher, **chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_in_memory_becomes_the_same_student(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """As its folder does, and it stays as it was: mode, weights, dtype, and what of it trains."""
    AutoModelForCausalLM.from_pretrained(folder / "teacher").to(dtype).save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(tmp_path / "saved")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype).train()
    teacher.lm_head.weight.requires_grad_(False)
    grads = {name: p.requires_grad for name, p in teacher.named_parameters()}
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    students = [
        convert(folder, teacher, tmp_path / "a", tokenizer=AutoTokenizer.from_pretrained(folder / "teacher")),
        convert(folder, tmp_path / "saved", tmp_path / "b", device="cpu"),
    ]
    first, second = (student.state_dict() for student in students)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert isinstance(students[0], LinearizedForCausalLM)
    assert teacher.training and teacher.dtype == dtype
    assert {name: p.requires_grad for name, p in teacher.named_parameters()} == grads
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    report = read_report(tmp_path / "a")
    assert report is not None and report.teacher == str(tmp_path / "saved")
    changed = first["lm.model.embed_tokens.weight"] - before["model.embed_tokens.weight"]
    assert float(changed.abs().max()) > 0  # all weights of the student were trained


def test_what_a_teacher_in_memory_cannot_have(folder: Path, tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    nameless = tiny("llama", num_hidden_layers=2)
    for options, word in (
        ({"stream": True, "overrides": {"stages.0.tokens": 0}}, "stream reads"),
        ({"adapter_only": True, "overrides": {"stages.0.tokens": 0}}, "give its folder"),
        ({"revision": "main"}, "revision given for a model in memory"), ({"dtype": "bfloat16"}, "dtype given"),
        ({"device": "cuda"}, "model is on cpu"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=word):
            convert(folder, teacher, tmp_path / "s", **options)
    with pytest.raises(InputError, match="give tokenizer="):
        convert(folder, nameless, tmp_path / "s")
    with pytest.raises(InputError, match="brings its own"):
        convert(folder, folder / "teacher", tmp_path / "s", tokenizer=AutoTokenizer.from_pretrained(folder / "teacher"))
    with pytest.raises(InputError, match="choose one"):
        convert(folder, folder / "teacher", tmp_path / "s", device="cpu", device_map="cpu")
    assert not list(tmp_path.iterdir())


def test_generate_takes_models_and_folders(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()
    line = linearize.generate(model, "the cat", max_new_tokens=9)
    again = linearize.generate(str(folder / "teacher"), "the cat", max_new_tokens=9)
    assert line.startswith("the cat") and line == again
    drafted = linearize.generate(model, "the cat", max_new_tokens=9, draft=str(folder / "teacher"))
    assert drafted == line and capsys.readouterr().out == ""
    with pytest.raises(InputError, match="store given for a model in memory"):
        linearize.generate(model, "the cat", store=3)
    with pytest.raises(InputError, match="the prompt is a list"):
        linearize.generate(model, ["the cat"])  # type: ignore[arg-type]


def test_habits_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    model: Any = tiny("llama", num_hidden_layers=1)
    ids = text(1, 5)
    for match, function in {
        "LlamaForCausalLM given: save": lambda: linearize.evaluate(model),
        "LlamaForCausalLM given: give a student": lambda: linearize.export(model, "hf", tmp_path / "out"),
        "input_ids is a list": lambda: linearize.speculate(model, model, ids.tolist(), max_new_tokens=2),
        "the draft is a str": lambda: linearize.speculate(model, "draft", ids, max_new_tokens=2),
    }.items():
        with pytest.raises(InputError, match=match):
            function()


@pytest.mark.slow
def test_a_self_contained_student_carries_its_code(folder: Path, tmp_path: Path) -> None:
    convert(folder, folder / "teacher", tmp_path / "s", self_contained=True)
    assert (tmp_path / "s" / "modeling_linearized.py").is_file()
    script = (
        "import sys; sys.modules['linearize'] = None\nimport torch\nfrom transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 's')!r}, trust_remote_code=True)\n"
        "with torch.no_grad():\n    print(float(m(torch.arange(3, 30)[None]).logits.double().abs().sum()))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    with torch.no_grad():
        here = linearize.load(tmp_path / "s")(torch.arange(3, 30)[None]).logits.double().abs().sum()
    assert float(done.stdout.split()[-1]) == pytest.approx(float(here), rel=1e-6)
