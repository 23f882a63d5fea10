"""Mixers, stages and exports of other packages: registered by a call or an entry point, and loaded when asked for."""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import test_mixer_contract as contract
import torch
import yaml
from models import student_of, text, tiny
from teacher_folder import write_teacher, write_text
from toy_stage import ToyRun

import linearize
from linearize.errors import InputError
from linearize.mixers import MIXERS, MixerConfig
from linearize.mixers.retrieval_heads import RetrievalHeadsConfig
from linearize.modeling.export import EXPORTS, Export, export_student
from linearize.recipes.schema import Recipe, load_recipe
from linearize.registry import Table, named_config
from linearize.training.config import StageConfig
from linearize.training.stages import STAGES

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[MixerConfig]]:
    """The example's mixer, registered by a call."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    config: type[MixerConfig] = importlib.import_module("elu_linear").EluLinearConfig
    assert linearize.register_mixer(config) is config
    yield config
    MIXERS.unregister("elu_linear")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example as an installed package with an entry point, and nothing of it imported."""
    site = install(tmp_path / "site")
    monkeypatch.syspath_prepend(str(site))
    sys.modules.pop("elu_linear", None)
    yield site
    if "elu_linear" in MIXERS._registered:
        MIXERS.unregister("elu_linear")


def install(site: Path, points: str = "[linearize.mixers]\nelu_linear = elu_linear:EluLinearConfig\n") -> Path:
    about = site / "elu_mixer-0.3.dist-info"
    about.mkdir(parents=True)
    (site / "elu_linear.py").write_text((EXAMPLES / "elu_linear.py").read_text("utf-8"), "utf-8")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: elu-mixer\nVersion: 0.3\n")
    (about / "entry_points.txt").write_text(points)
    return site


def contract_cases() -> list[Any]:
    """Every test of the contract that runs on all mixers, with every combination of its other parameters."""
    cases = []
    for name, test in vars(contract).items():
        marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
        whole = [mark for mark in marks if mark.args[0] == "config" and any(c.name == "gla" for c in mark.args[1])]
        if not name.startswith("test_") or not whole:
            continue
        others = [mark for mark in marks if mark.args[0] != "config"]
        for values in itertools.product(*(mark.args[1] for mark in others)):
            arguments: dict[str, Any] = {}
            for mark, value in zip(others, values, strict=True):
                names = [mark.args[0]] if isinstance(mark.args[0], str) else mark.args[0]
                arguments |= dict(zip(names, [value] if isinstance(mark.args[0], str) else value, strict=True))
            cases.append(pytest.param(test, arguments, id=f"{name}-{len(cases)}"))
    return cases


@pytest.mark.parametrize(("test", "arguments"), contract_cases())
def test_the_example_keeps_the_contract(example: type[MixerConfig], test: Any, arguments: dict[str, Any]) -> None:
    assert set(inspect.signature(test).parameters) == {"config", *arguments}
    with torch.no_grad():
        test(config=example(), **arguments)


def test_the_contract_is_whole() -> None:
    assert len({case.values[0].__name__ for case in contract_cases()}) >= 10


@torch.no_grad()
def test_the_example_is_the_equation(example: type[MixerConfig]) -> None:
    """Against sums written out, with several queries per key/value head."""
    mixer: Any = contract.build(example())
    q, k, v = contract.inputs(mixer)
    y, _ = mixer(q, k, v, scaling=0.3, layout=contract.Layout())
    group = contract.H // contract.G
    phi_q, phi_k = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k.repeat_interleave(group, 1)))
    weights = torch.einsum("bhtd,bhsd->bhts", phi_q, phi_k).tril()
    expected = weights @ v.repeat_interleave(group, 1) / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_recipes_name_a_registered_mixer(example: type[MixerConfig]) -> None:
    recipe = load_recipe("lolcats").override({"plan.mixer.name": "elu_linear", "plan.mixer.eps": 1e-4})
    assert recipe.plan.mixer == example(eps=1e-4)  # type: ignore[call-arg]
    assert Recipe.from_data(yaml.safe_load(recipe.to_yaml())) == recipe
    heads = recipe.override({"plan.heads.keep": [[0, 1]]}).plan
    kept = heads.with_heads(heads.resolve(2), [2, 2])
    assert kept == [RetrievalHeadsConfig(groups=(1,), mixer=example(eps=1e-4)), example(eps=1e-4)]  # type: ignore[call-arg]
    for settings, word in (
        ({"plan.mixer.epps": 1}, "plan.mixer.eps"), ({"plan.mixer.name": "elu_linea"}, "elu_linear"),
        ({"plan.mixer.eps": "much"}, "much"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=word):
            recipe.override(settings)
    with pytest.raises(InputError, match=r"known: plan\.mixer\.eps, plan\.mixer\.name$"):
        Recipe.from_data({"plan": {"mixer": {"name": "elu_linear", "window": 3}}, "stages": []})


def test_an_entry_point_is_loaded_when_it_is_asked_for(installed: Path) -> None:
    assert "elu_linear" in MIXERS and "elu_linear" in list(MIXERS) and "elu_linear" not in sys.modules
    assert MIXERS.package("lolcats") is None
    config = MIXERS["elu_linear"]
    assert config is sys.modules["elu_linear"].EluLinearConfig and MIXERS.package("elu_linear") == "elu-mixer"


def run(code: str, *paths: Path) -> str:
    """Run code in a process of its own with these folders on the path; returns what it prints last."""
    search = os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": search}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_student_loads_where_its_mixer_is_installed_and_only_there(
    example: type[MixerConfig], tmp_path: Path
) -> None:
    site = install(tmp_path / "site")
    student = student_of(tiny("llama", num_hidden_layers=2), [example(), None])
    student.config.mixer_packages = {"elu_linear": "elu-mixer"}  # as from the entry point
    ids = text(1, 19)
    with torch.no_grad():
        expected = float(student(ids).logits.double().abs().sum())
    folder = tmp_path / "student"
    student.save_pretrained(folder)
    (folder / "elu_linear.py").write_text("raise SystemExit('code of a checkpoint was run')")
    load = (
        f"import linearize, torch\ntry:\n    m = linearize.load({str(folder)!r})\n"
        "    with torch.no_grad():\n"
        f"        print(float(m(torch.tensor({ids.tolist()})).logits.double().abs().sum()))\n"
        "except linearize.InputError as error:\n    print(error)\n"
    )
    assert float(run(load, site)) == pytest.approx(expected, rel=1e-6)
    message = run(load)
    assert "elu_linear" in message and "elu-mixer" in message and "install" in message
    with pytest.raises(InputError, match=r"package elu_linear, which is not copied.*no target"):
        student.config.set_plan([example(), None])
        export_student(student, "hf", tmp_path / "hf")


class ToyConfig(StageConfig):
    """A stage of another package."""

    name: Literal["toy"] = "toy"
    weight: float = 2.0

    def build(self, student: Any, teacher: Any) -> Any:
        return ToyRun()


def test_a_stage_of_another_package() -> None:
    linearize.register_stage(ToyConfig)
    try:
        stages = [{"name": "toy", "tokens": 30, "lr": 1e-2, "weight": 3}]
        recipe = Recipe.from_data({"plan": {"mixer": {"name": "lolcats"}}, "stages": stages})
        assert recipe.stages[0] == ToyConfig(tokens=30, lr=1e-2, weight=3.0)
        assert recipe.override({"stages.0.weight": 5}).stages[0].weight == 5  # type: ignore[attr-defined]
        with pytest.raises(InputError, match=r"stages\.0\.weight"):
            recipe.override({"stages.0.wight": 5})
    finally:
        STAGES.unregister("toy")
    with pytest.raises(InputError, match="toy"):
        Recipe.from_data({"plan": {"mixer": {"name": "lolcats"}}, "stages": stages})


def test_an_export_of_another_package(tmp_path: Path) -> None:
    def write(student: Any, source: Any, folder: Path) -> None:
        (folder / "layers.txt").write_text(str(len(source.plan)))

    linearize.register_export("layers", Export(misfit=lambda source: None, write=write, native=False))
    try:
        student = student_of(tiny("llama", num_hidden_layers=2), [MIXERS["gla"](), None])
        out = export_student(student, "layers", tmp_path / "out")
        assert (out / "layers.txt").read_text() == "2" and "layers" in (out / "README.md").read_text()
    finally:
        EXPORTS.unregister("layers")
    assert list(EXPORTS) == list(EXPORTS.own)


def test_what_cannot_be_registered(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Taken(MixerConfig):
        name: Literal["gla"] = "gla"

    class Nameless(MixerConfig):
        window: int = 3

    table: Table[type[MixerConfig]] = Table("mixer", "linearize.mixers", {}, named_config(MixerConfig))
    with pytest.raises(InputError, match="linearize itself"):
        linearize.register_mixer(Taken)
    with pytest.raises(InputError, match="name: Literal"):
        linearize.register_mixer(Nameless)
    with pytest.raises(InputError, match="derived from MixerConfig"):
        table.register("x", int)  # type: ignore[type-var]
    table.register("gla", Taken)
    table.register("gla", Taken)
    with pytest.raises(InputError, match="another name"):
        table.register("gla", type("Other", (Taken,), {"__module__": "elsewhere"}))
    second = install(installed.parent / "second")
    (second / "elu_mixer-0.3.dist-info").rename(second / "twin-1.0.dist-info")
    (second / "twin-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: twin\nVersion: 1.0\n")
    points = second / "twin-1.0.dist-info" / "entry_points.txt"
    points.write_text("[linearize.mixers]\nelu_linear = twin:Other\nbroken = no_such_module:Config\n")
    monkeypatch.syspath_prepend(str(second))
    with pytest.raises(InputError, match="elu-mixer, twin"):
        MIXERS["elu_linear"]
    with pytest.raises(InputError, match="package twin, which cannot be imported: No module named 'no_such_module'"):
        MIXERS["broken"]


def test_it_converts_in_a_command(installed: Path, tmp_path: Path) -> None:
    """As a user has it: the package is installed, and a recipe file names its mixer."""
    write_teacher(tmp_path / "teacher", num_hidden_layers=2)
    write_text(tmp_path / "text.txt")
    recipe = {
        "plan": {"mixer": {"name": "elu_linear"}}, "data": {"length": 40, "heldout": 0.2},
        "stages": [{"name": "distill", "train": "all", "tokens": 120, "lr": 1e-3, "batch": 3}],
    }  # fmt: skip
    (tmp_path / "elu.yaml").write_text(yaml.safe_dump(recipe))
    student = linearize.convert(
        tmp_path / "teacher", data=[tmp_path / "text.txt"], recipe=str(tmp_path / "elu.yaml"), out=tmp_path / "s",
        device="cpu",
    )  # fmt: skip
    assert student is not None and student.config.mixer_packages == {"elu_linear": "elu-mixer"}
