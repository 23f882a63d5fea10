"""A folder with its own code needs torch, transformers, safetensors and pydantic, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import mixer, student_of, text, tiny
from safetensors.torch import save_file

from linearize.mixers import MIXERS
from linearize.modeling.export import export_student

pytestmark = pytest.mark.slow

SCRIPT = '''
"""Load a folder with only the four named packages and those that they need."""
import json, re, sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

def needed(name, found):
    if name not in found:
        try:
            wanted = requires(name) or []
        except PackageNotFoundError:
            return found
        found.add(name)
        for line in wanted:
            if "extra ==" not in line:
                needed(re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-"), found)
    return found

there = set()
for name in ("torch", "transformers", "safetensors", "pydantic"):
    needed(name, there)
known = packages_distributions()
missing = {top for top, names in known.items() if not any(n.lower().replace("_", "-") in there for n in names)}
missing |= {"linearize", "triton", "peft"}

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in missing else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not PathFinder] + [Finder]

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
folder, new = sys.argv[1], int(sys.argv[2])
given = load_file(folder + "/../expected.safetensors")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model(given["ids"]).logits
    hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(given["ids"]).last_hidden_state
    headed = model.get_output_embeddings()(hidden)
generated = model.generate(given["ids"], max_new_tokens=new, do_sample=False)
print(json.dumps({
    "missing": sorted(missing),
    "logits": float((logits - given["logits"]).abs().max()),
    "headed": float((headed - given["logits"]).abs().max()),
    "generated": torch.equal(generated, given["generated"]),
}))
'''
TOKENS, NEW = 19, 6


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a student with every mixer of the table gives there."""
    root = tmp_path_factory.mktemp("alone")
    plan = [*(mixer(name) for name in sorted(MIXERS)), None]
    student = student_of(tiny("llama", num_hidden_layers=len(plan)), plan)
    ids = text(2, TOKENS)
    with torch.no_grad():
        logits = student(ids).logits
        generated = student.generate(ids, max_new_tokens=NEW, do_sample=False)
    save_file({"ids": ids, "logits": logits, "generated": generated}, root / "expected.safetensors")
    folder: Path = export_student(student, "hf", root / "model")
    command = [sys.executable, "-c", SCRIPT, str(folder), str(NEW)]
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_it_loads_and_generates_without_optional_packages(alone: dict[str, Any]) -> None:
    assert {"linearize", "triton", "peft"} <= set(alone["missing"])
    assert alone["logits"] < 1e-4
    assert alone["headed"] < 1e-4, "AutoModel gives the hidden states that the head takes"
    assert alone["generated"]
