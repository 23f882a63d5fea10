"""A damaged folder of a teacher or student is an error of one line that names the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from models import mixer, student_of
from safetensors.torch import load_file, save_file
from test_evaluation_outputs import tiny_llama, tiny_tokenizer

import linearize
from linearize.decoding.loading import load_any
from linearize.errors import InputError
from linearize.modeling.io.integrity import INDEX, tensors_of
from linearize.modeling.io.teacher import load_teacher

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whole` (one file), `shards` (several), and `student`."""
    path = tmp_path_factory.mktemp("models")
    teacher = tiny_llama(1)
    for name, size in (("whole", "1GB"), ("shards", "20KB")):
        teacher.save_pretrained(path / name, max_shard_size=size)
        tiny_tokenizer().save_pretrained(path / name)
    student_of(teacher, mixer()).save_pretrained(path / "student")
    tiny_tokenizer().save_pretrained(path / "student")
    return path


def cut(path: Path, by: int = 100) -> None:
    os.truncate(path, max(0, path.stat().st_size - by))


def shard(folder: Path) -> Path:
    """The second of several."""
    return sorted(folder.glob("model-*.safetensors"))[1]


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors[sorted(tensors)[-1]]
    save_file(tensors, path, {"format": "pt"})


def flip_in_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[9] ^= 0xFF
    path.write_bytes(content)


def lost_map(path: Path) -> None:
    path.write_text(json.dumps({"metadata": {}}))


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "weights cut short": ("whole", lambda f: cut(f / WEIGHTS), rf"{WEIGHTS} is cut short: it has"),
    "weights too long": ("whole", lambda f: longer(f / WEIGHTS), rf"{WEIGHTS} is damaged: it has"),
    "weights empty": ("whole", lambda f: cut(f / WEIGHTS, 10**9), rf"{WEIGHTS} is damaged or cut short"),
    "header": ("whole", lambda f: flip_in_header(f / WEIGHTS), rf"{WEIGHTS} is damaged: .*header cannot be read"),
    "a tensor fewer": ("whole", lambda f: without_a_tensor(f / WEIGHTS), r"lacks weights of a llama model \(.*; 1 "),
    "shard cut short": ("shards", lambda f: cut(shard(f)), r"model-00002-of-\d+.safetensors is cut short"),
    "shard gone": ("shards", lambda f: shard(f).unlink(), rf"{INDEX} names model-00002-of-.*not there \(1 of"),
    "shard lacks": ("shards", lambda f: without_a_tensor(shard(f)), r"model-00002-of-\S+ lacks the tensor .*"),
    "index cut short": ("shards", lambda f: cut(f / INDEX), rf"{INDEX}: not valid JSON"),
    "index empty": ("shards", lambda f: lost_map(f / INDEX), rf"{INDEX} is damaged: it has no weight_map"),
    "config empty": ("whole", lambda f: cut(f / "config.json", 10**9), r"config.json: not valid JSON"),
    "config cut short": ("whole", lambda f: cut(f / "config.json", 9), r"config.json: not valid JSON"),
    "config is a list": ("whole", lambda f: (f / "config.json").write_text("[1]") and None, r"holds no JSON object"),
    "generation config": ("whole", lambda f: cut(f / "generation_config.json", 9), r"n_config.json: not valid"),
    "tokenizer cut short": ("whole", lambda f: cut(f / "tokenizer.json"), r"tokenizer.json: not valid JSON"),
    "tokenizer gone": ("whole", lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer: tokenizer.json is miss"),
    "tokenizer of another kind": (
        "whole", lambda f: (f / "tokenizer.json").write_text("{}") and None, r"cannot load the tokenizer of",
    ),
    "student cut short": ("student", lambda f: cut(f / WEIGHTS), rf"{WEIGHTS} is cut short"),
    "student lacks": ("student", lambda f: without_a_tensor(f / WEIGHTS), r"do not fit its plan \(missing"),
    "student's tokenizer": ("student", lambda f: cut(f / "tokenizer.json"), r"tokenizer.json: not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(folders: Path, tmp_path: Path, how: str) -> None:
    kind, damage, message = DAMAGES[how]
    path = tmp_path / "model"
    shutil.copytree(folders / kind, path)
    load_any(path, device="cpu")
    damage(path)
    with pytest.raises(InputError, match=message) as caught:
        load_any(path, device="cpu")
    printed = str(caught.value)
    assert ("\n" not in printed and str(path) in printed) or how == "student lacks"
    if kind == "student":
        with pytest.raises(InputError, match=message):
            linearize.load(path)


def test_headers_match_what_safetensors_reads(folders: Path) -> None:
    path = folders / "student" / WEIGHTS
    assert {name: tuple(entry["shape"]) for name, entry in tensors_of(path).items()} == {
        name: tuple(value.shape) for name, value in load_file(path).items()
    }


def test_what_is_not_read_does_not_matter(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "whole", tmp_path / "model")
    (tmp_path / "model" / "consolidated.safetensors").write_bytes(b"half")
    load_teacher(tmp_path / "model")
