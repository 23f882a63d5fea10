"""A student exported with its own code runs where linearize cannot be imported, and next to it where it can."""

from __future__ import annotations

import ast
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
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from linearize.mixers import MIXERS
from linearize.modeling.export import export_student, remote_code

pytestmark = pytest.mark.slow

TOKENS, PROMPT, NEW = 21, 4, 7
NOT_OURS = {"torch", "transformers", "pydantic", "safetensors"}
SCRIPT = """
import json, sys
sys.modules["linearize"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder, prompt, new = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
given = load_file(folder + "/../expected.safetensors")
ids, found, models = given["ids"], {}, {}

def difference(model, parts):
    logits, cache = [], None
    for tokens in ids.split(parts, dim=1):
        with torch.no_grad():
            out = model(tokens, past_key_values=cache, use_cache=True)
        logits, cache = [*logits, out.logits], out.past_key_values
    return float((torch.cat(logits, 1) - given["logits"]).abs().max())

for name in ("model", "again"):
    path = folder + "/../" + name
    model = models[name] = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    generated = model.generate(ids, max_new_tokens=new, do_sample=False)
    found[name] = {
        "prefill": difference(model, [ids.shape[1]]),
        "decode": difference(model, [prompt] + [1] * (ids.shape[1] - prompt)),
        "generated": torch.equal(generated, given["generated"]),
        "module": type(model).__module__,
    }
    if name == "model":
        model.save_pretrained(folder + "/../again")
del sys.modules["linearize"]
import linearize
models["installed"] = linearize.load(folder)
found["together"] = {name: difference(model, [5, ids.shape[1] - 5]) for name, model in models.items()}
found["classes"] = len({type(model) for model in models.values()})
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with every mixer of the table and a kept layer, exported; what it computes lies beside the folder."""
    root = tmp_path_factory.mktemp("remote")
    plan = [*(mixer(name) for name in sorted(MIXERS)), None]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        student = student_of(tiny("llama", num_hidden_layers=len(plan)), plan)
    ids = text(2, TOKENS)
    with torch.no_grad():
        logits = student(ids).logits
        generated = student.generate(ids, max_new_tokens=NEW, do_sample=False)
    save_file({"ids": ids, "logits": logits, "generated": generated}, root / "expected.safetensors")
    return export_student(student, "hf", root / "model")


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the folder gives in a process without linearize, saved again too, and then beside an installed linearize."""
    command = [sys.executable, "-c", SCRIPT, str(folder), str(PROMPT), str(NEW)]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("name", ["model", "again"])
def test_it_runs_alone_and_when_saved_again(alone: dict[str, Any], name: str) -> None:
    result = alone[name]
    assert result["module"].startswith(f"transformers_modules.{name}.")
    assert result["prefill"] < 1e-4
    assert result["decode"] < 1e-4
    assert result["generated"]


def test_copies_and_an_installed_linearize_do_not_get_in_each_others_way(alone: dict[str, Any]) -> None:
    assert alone["classes"] == 3
    for name, difference in alone["together"].items():
        assert difference < 1e-4, name


def test_the_code_asks_for_no_package_of_ours_and_no_optional_one(folder: Path) -> None:
    files = sorted(folder.glob("*.py"))
    assert len(files) > 20
    for path in files:  # a Hub repository is checked file by file
        packages = set(get_imports(path)) - set(sys.stdlib_module_names)
        assert packages <= NOT_OURS, f"{path.name} asks for {sorted(packages - NOT_OURS)}"
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                level = getattr(node, "level", 0)
                assert level or not any(name.split(".")[0] == "linearize" for name in names), path.name
    followed = {Path(name).name for name in get_relative_import_files(folder / "modeling_linearized.py")}
    assert followed == {path.name for path in files} - {"modeling_linearized.py"}
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "modeling_linearized.LinearizeConfig",
        "AutoModel": "modeling_linearized.LinearizedModel",
        "AutoModelForCausalLM": "modeling_linearized.LinearizedForCausalLM",
    }
    content = (folder / "README.md").read_text()
    assert "pydantic" in content
    assert "trust_remote_code=True" in content


SOURCE = '''"""Says import fla in words."""
import math, json
import torch
from linearize.ops.layout import Layout
from linearize.ops import layout as where
from linearize.ops import matmul as products
from linearize.errors import (
    InputError,
    unknown,
)


def f():
    import fla.ops
    from linearize.numbers import parse_count

    try:
        from mamba_ssm import scan
    except ImportError:
        scan = None
    if scan:
        from triton import (
            jit,
        )
    return fla, parse_count
'''
EXPECTED = '''"""Says import fla in words."""
import math, json
import torch
from .linearize_ops_layout import Layout
from . import linearize_ops_layout as where
from . import linearize_ops_matmul as products
from .linearize_errors import (
    InputError,
    unknown,
)


def f():
    try:
        import fla.ops
    except ImportError:
        raise
    from .linearize_numbers import parse_count

    try:
        from mamba_ssm import scan
    except ImportError:
        scan = None
    if scan:
        try:
            from triton import (
                jit,
            )
        except ImportError:
            raise
    return fla, parse_count
'''


def test_imports_are_rewritten_and_nothing_else() -> None:
    assert remote_code._rewritten("example", SOURCE) == EXPECTED
    entry = remote_code._entry({"example": SOURCE})
    assert "from .linearize_ops_matmul import __name__" in entry  # the loader overlooks `from . import`


@pytest.mark.parametrize("line", ["import linearize.ops.layout", "from .base import Mixer"])
def test_imports_of_another_form_stop_the_export(line: str) -> None:
    with pytest.raises(AssertionError, match="example"):
        remote_code._rewritten("example", line + "\n")


def test_names_known_to_transformers_are_those_of_the_copy() -> None:
    made = remote_code.code()
    own = '_" + str(__package__).replace(".", "_")\n'
    assert f'ATTENTION = "linearize{own}' in made["linearize_modeling_attention"]
    assert f'MIXER_LAYER = "linearize_mixer{own}' in made["linearize_modeling_config"]
    assert f'PROBE = "linearize_probe{own}' in made["linearize_modeling_probe"]
