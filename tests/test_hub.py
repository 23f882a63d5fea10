"""The Hub, against a stand-in for its HTTP interface: revisions and tokens on the way in, folders and cards out."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest
import torch
import yaml
from hub_server import ACCOUNT, TOKEN, Hub, Repository, running_hub, use_hub
from teacher_folder import write_teacher, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command

import linearize
from linearize.cli.main import app, main
from linearize.errors import InputError
from linearize.evaluation.run import EvaluationOptions, evaluate
from linearize.evaluation.sections.language import Language
from linearize.metrics.report import read_report, without_token
from linearize.modeling.io.hub import upload
from linearize.planning.estimate import plan_conversion

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "plan": {"mixer": {"name": "lolcats", "window": 4, "feature_dim": 3}},
    "data": {"length": 40, "heldout": 0.2},
    "stages": [{"name": "attention_transfer", "tokens": 240, "lr": 1e-2, "batch": 3, "evaluate_every": 0.5}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers of the same shape, text and a recipe."""
    path = tmp_path_factory.mktemp("hub")
    for name, seed in (("old", 3), ("new", 4)):
        write_teacher(path / name, num_hidden_layers=2, seed=seed)
    write_text(path / "text.txt")
    (path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, with `org/teacher` at two commits (`v1`, `main`), and an empty cache."""
    with running_hub() as server:
        repository = server.repositories["org/teacher"] = Repository()
        repository.commit(content(folder / "old"), "v1")
        repository.commit(content(folder / "new"))
        use_hub(server, monkeypatch, tmp_path / "cache")
        monkeypatch.setattr("linearize.conversion.outputs.plot_stages", lambda *_: [])
        monkeypatch.setattr("linearize.conversion.outputs.plot_layer_error", lambda *_: [])
        yield server


def convert(folder: Path, out: Path, teacher: Any = "org/teacher", **options: Any) -> Any:
    chosen = {"data": [folder / "text.txt"], "recipe": str(folder / "tiny.yaml"), "device": "cpu", "out": out}
    return linearize.convert(teacher, **{**chosen, **options})


def test_a_revision_is_what_is_converted_and_its_commit_is_pinned(folder: Path, hub: Hub, tmp_path: Path) -> None:
    student = convert(folder, tmp_path / "s", revision="v1")
    here = AutoModelForCausalLM.from_pretrained(folder / "old").get_input_embeddings().weight
    assert torch.equal(student.get_input_embeddings().weight, here)
    report = read_report(tmp_path / "s")
    commit = hub.repositories["org/teacher"].branches["v1"]
    assert report is not None and report.teacher == "org/teacher" and report.provenance["teacher_commit"] == commit
    assert student.config.teacher_name == "org/teacher"
    other = plan_conversion("org/teacher", recipe=str(folder / "tiny.yaml"), revision="v1", token=TOKEN)
    assert other.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder / "old").parameters())


def test_an_adapter_of_a_revision_finds_it_again(folder: Path, hub: Hub, tmp_path: Path) -> None:
    student = convert(folder, tmp_path / "a", revision="v1", adapter_only=True)
    again = linearize.load(tmp_path / "a")
    ids = torch.arange(3, 30)[None]
    torch.testing.assert_close(again(ids).logits, student(ids).logits)
    assert again.config.teacher_name == "org/teacher"


def test_a_student_goes_to_the_hub_and_comes_back(
    folder: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(folder / "text.txt"), "--recipe", str(folder / "tiny.yaml"), "--device", "cpu"]
    out = tmp_path / "s"
    pushed = ["--push-to", "tiny-student", "--private", "--token", TOKEN, "--self-contained"]
    assert main(["convert", str(folder / "old"), *arguments, "--out", str(out), *pushed]) == 0
    name = f"{ACCOUNT}/tiny-student"
    repository = hub.repositories[name]
    assert repository.private and f"{name}/commit/" in capsys.readouterr().err
    expected = {path for path in content(out) if not path.startswith("log/")}
    assert set(repository.files) == {*expected, ".gitattributes"}
    assert {"README.md", "recipe.yaml", "report.json", "tokenizer.json", "modeling_linearized.py"} <= expected
    assert repository.files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert TOKEN.encode() not in b"".join(repository.files.values())
    ids = torch.arange(3, 30)[None]
    student, back = linearize.load(out), linearize.load(name, dtype="bfloat16", device_map={"": "cpu"})
    assert back.dtype == torch.bfloat16
    back = linearize.load(name)
    assert torch.equal(back(ids).logits, student(ids).logits)
    report = evaluate(
        name, teacher=str(folder / "old"), data=[str(folder / "text.txt")], sections=[Language()],
        options=EvaluationOptions(device="cpu", revision="main", tokens=600),
    )  # fmt: skip
    assert report.provenance["commits"] == {name: repository.branches["main"]}
    assert [entry.name for entry in report.contestants] == ["teacher", "tiny-student"]


def test_a_loaded_student_takes_card_tokenizer_and_report_along(folder: Path, hub: Hub, tmp_path: Path) -> None:
    student = convert(folder, tmp_path / "s", teacher=folder / "old")
    with torch.no_grad():
        student.get_input_embeddings().weight.mul_(2)
    address = student.push_to_hub("again")
    repository = hub.repositories[f"{ACCOUNT}/again"]
    assert address.endswith(repository.branches["main"]) and not repository.private
    assert {"README.md", "recipe.yaml", "report.json", "tokenizer.json", "config.json"} <= set(repository.files)
    assert repository.files["README.md"] == (tmp_path / "s" / "README.md").read_bytes()
    assert repository.files["model.safetensors"] != (tmp_path / "s" / "model.safetensors").read_bytes()
    teacher = AutoModelForCausalLM.from_pretrained(folder / "old")
    bare = linearize.convert_model(teacher, [linearize.GlaConfig(window=3), None])
    bare.name_or_path = bare.config._name_or_path = ""
    with pytest.raises(InputError, match="tokenizer="):
        bare.push_to_hub("bare")
    assert f"{ACCOUNT}/bare" not in hub.repositories
    bare.push_to_hub("org/bare", tokenizer=AutoTokenizer.from_pretrained(folder / "old"))
    card = hub.repositories["org/bare"].files["README.md"].decode()
    assert "`gla` in 1 of 2 layers" in card and 'linearize.load("org/bare")' in card


def test_refusals_come_in_one_line_and_before_any_work(
    folder: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises(InputError) as caught:
            convert(folder, tmp_path / "s", **options)
        assert not list(tmp_path.glob("*s*.run")) and "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such revision" in refused(revision="v2")
    assert "org/gone" in refused(teacher="org/gone")
    assert "revisions are of Hub names" in refused(teacher=folder / "old", revision="v1")
    assert "--push-to" in refused(private=True)
    assert "choose one" in refused(teacher=folder / "old", self_contained=True, adapter_only=True)
    assert "HF_TOKEN" in refused(teacher=folder / "old", push_to="x/y", token="hf_wrong")
    assert "x/y" not in hub.repositories
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused(teacher=folder / "old", push_to="x/y")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert "HF_HUB_OFFLINE" in refused(teacher=folder / "old", push_to="x/y")
    assert "HF_HUB_OFFLINE" in refused(teacher="org/other")
    assert len(hub.requests) == before


def test_a_model_in_the_cache_needs_no_network(
    folder: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(folder, tmp_path / "s", revision="v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    convert(folder, tmp_path / "t", revision="v1")
    assert (tmp_path / "t" / "model.safetensors").read_bytes() == (tmp_path / "s" / "model.safetensors").read_bytes()


def test_an_upload_that_fails_leaves_the_student(
    folder: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hub_server._Handler._commit", lambda self, *_: self._refuse(403, "Forbidden"))
    arguments = ["--data", str(folder / "text.txt"), "--recipe", str(folder / "tiny.yaml"), "--device", "cpu"]
    out = str(tmp_path / "s")
    assert main(["convert", str(folder / "old"), *arguments, "--out", out, "--push-to", "org/late"]) == 1
    assert json.loads((tmp_path / "s" / "report.json").read_text())["recipe"] == "tiny"
    assert "push_to_hub" in capsys.readouterr().err.splitlines()[-1]


def test_an_upload_that_breaks_below_http_is_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ConnectionError("Network error")  # as hf_xet raises it

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", broken)
    with pytest.raises(InputError, match="Network error"):
        upload(tmp_path, "org/late", token=None, message="m")


def test_a_token_is_not_recorded() -> None:
    given_one = ["convert", "x", "--token", "hf_secret", "--token=hf_secret", "--out", "s"]
    assert without_token(given_one) == ["convert", "x", "--token", "...", "--token=...", "--out", "s"]


VERBS: dict[str, list[str]] = {
    "generate": ["--prompt", "the cat", "--max-new-tokens", "3", "--device", "cpu"],
    "chat": ["--max-new-tokens", "3", "--device", "cpu"],
    "inspect": [],
    "bench": ["--context", "8", "--new-tokens", "2", "--repeats", "1", "--device", "cpu"],
    "plan": ["--recipe", "lolcats", "--device", "A100-80"],
    "serve": ["--port", "0", "--device", "cpu"],
    "export": ["--to", "hf"],
}


def test_every_verb_that_names_a_model_takes_its_revision() -> None:
    known: Any = get_command(app).commands  # type: ignore[attr-defined]
    named = {"model", "teacher", "student", "folder"}
    verbs = {name: verb for name, verb in known.items() if named & {p.name for p in verb.params if p.name in named}}
    assert {*VERBS, "convert", "eval", "verify"} <= set(verbs)
    for name, verb in verbs.items():
        options = {option for parameter in verb.params for option in parameter.opts}
        assert {"--revision", "--token"} <= options, name


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_reads_the_revision_that_is_named(
    verb: str,
    folder: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A hidden repository whose `v1` alone has a model."""
    if verb == "serve":
        pytest.importorskip("uvicorn")
    student = linearize.convert_model(
        AutoModelForCausalLM.from_pretrained(folder / "old"), [linearize.GlaConfig(window=3), None]
    )
    student.save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(folder / "old").save_pretrained(tmp_path / "student")
    hidden = hub.repositories["org/hidden"] = Repository(private=True)
    hidden.commit(content(tmp_path / "student" if verb == "export" else folder / "old"), "v1")
    hidden.commit({"README.md": b"nothing"}, "main")
    hidden.commits[hidden.branches["main"]] = {"README.md": b"nothing"}
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("linearize.serving.server._run", lambda *_: None)
    more = ["--out", str(tmp_path / "out")] if verb in ("export", "bench") else []
    command = [verb, "org/hidden", *VERBS[verb], *more]
    assert main([*command, "--revision", "v1", "--token", TOKEN]) == 0, capsys.readouterr().err
    for wrong, reason in (
        (["--token", TOKEN, "--revision", "v9"], "no such revision"), (["--revision", "v1"], "HF_TOKEN"),
        (["--token", TOKEN], ""),
    ):  # fmt: skip
        if wrong == ["--revision", "v1"]:
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
        assert main([*command, *wrong, *(["--overwrite"] if verb == "export" else [])]) == 2
        printed = capsys.readouterr().err.strip().splitlines()
        assert reason in printed[-1] and TOKEN not in printed[-1]
