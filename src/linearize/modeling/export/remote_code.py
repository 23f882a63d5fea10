"""Students as folders that carry their own code: the modules of this package that a student needs, copied flat.

transformers' loader of remote code follows relative imports of single files and asks that every other package that a
file imports be installed, unless the import stands in a `try`. So every import of ours becomes `from .linearize_x_y
import ...`, and imports of optional packages move into a `try`.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from linearize.mixers import MixerConfig, mixer_package
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.export.common import Source, name_of

PACKAGE = "linearize"
ROOT = Path(__file__).resolve().parents[2]
ENTRY = "modeling_linearized"
CLASSES = {
    "AutoConfig": "LinearizeConfig",
    "AutoModel": "LinearizedModel",
    "AutoModelForCausalLM": "LinearizedForCausalLM",
}
ROOTS = {
    "LinearizeConfig": "linearize.modeling.config",
    "LinearizedModel": "linearize.modeling.student",
    "LinearizedForCausalLM": "linearize.modeling.student",
}
REQUIRED = frozenset({"torch", "transformers", "pydantic", "safetensors", "numpy"})
GLOBAL_NAMES = {"linearize.modeling.attention": "ATTENTION", "linearize.modeling.config": "MIXER_LAYER",
                "linearize.modeling.probe": "PROBE"}  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """Lines `first` to `last` (from 1, both included) of a file and what stands there instead."""

    first: int
    last: int
    lines: list[str]


def misfit(source: Source) -> str | None:
    """Why a student cannot carry its own code: a mixer that another package has registered is not copied."""
    return foreign(source.plan)


def foreign(plan: Iterable[MixerConfig | None]) -> str | None:
    """Which mixer of a plan is another package's, in a sentence; None: they are all ours."""
    for mixer in plan:
        if mixer is not None and (package := mixer_package(mixer)) is not None:
            return f"the code of the mixer {name_of(mixer.inner)} is in the package {package}, which is not copied"
    return None


def write(student: LinearizedForCausalLM, source: Source, folder: Path) -> None:
    """The student as it is, `auto_map` in its config, and the code of the installed package beside it."""
    student.save_pretrained(folder)
    add_code(folder)


def add_code(folder: Path) -> None:
    """Put the code of the installed package into a student's folder, and `auto_map` into its config."""
    for name, text in code().items():
        (folder / f"{name}.py").write_text(text, "utf-8")
    path = folder / "config.json"
    fields = json.loads(path.read_text("utf-8"))
    fields["auto_map"] = {auto: f"{ENTRY}.{name}" for auto, name in CLASSES.items()}
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", "utf-8")


def code() -> dict[str, str]:
    """Module name to text: our modules from the student's on, flat, and the entry that transformers loads.

    Names that our modules register with transformers contain the package that the copy is loaded as: neither an
    installed linearize nor another student's copy can take their place.
    """
    originals = _closure(sorted(set(ROOTS.values())))
    made = {_flat(name): _rewritten(name, text) for name, text in originals.items()}
    for module, constant in GLOBAL_NAMES.items():
        made[_flat(module)] = _own_name(made[_flat(module)], constant)
    made[ENTRY] = _entry(originals)
    return made


def _entry(originals: dict[str, str]) -> str:
    """The file that transformers loads. It names what other files import as modules, which the loader overlooks; it
    names them where nothing is executed, since some of them need an optional package (triton).

    The classes become its own, so that saving a loaded student again writes the same `auto_map` and all files.
    """
    nodes = [node for text in originals.values() for node in ast.walk(ast.parse(text))]
    ours = [node for node in nodes if isinstance(node, ast.ImportFrom) and _is_ours(node.module)]
    modules = {name for node in ours for name, alias in _targets(node) if alias is not None}
    lines = ["from typing import TYPE_CHECKING", ""]
    lines += [f"from .{_flat(module)} import {name}" for name, module in sorted(ROOTS.items())]
    lines += ["", "if TYPE_CHECKING:  # for the loader, which reads this text to find the files"]
    lines += [f"    from .{_flat(name)} import __name__ as _{_flat(name)}" for name in sorted(modules)]
    names = ", ".join(f'"{name}"' for name in sorted(ROOTS))
    header = '"""What transformers loads from this folder; the files beside it are copies of the package linearize."""'
    own = " = ".join(f"{name}.__module__" for name in sorted(ROOTS))
    return "\n".join([header, "", *lines, "", f"__all__ = [{names}]", "", f"{own} = __name__", ""])


def _closure(roots: list[str]) -> dict[str, str]:
    """The sources of modules and of all modules of ours that they import, by full name."""
    sources: dict[str, str] = {}
    queue = list(roots)
    while queue:
        name = queue.pop()
        if name not in sources:
            sources[name] = _file(name).read_text("utf-8")
            for node in ast.walk(ast.parse(sources[name])):
                if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
                    queue += [module for module, _ in _targets(node)]
    return sources


def _path(name: str) -> Path | None:
    """The file of a module or package of ours; None: there is no such module."""
    below = ROOT.joinpath(*name.split(".")[1:])
    return next((p for p in (below.with_suffix(".py"), below / "__init__.py") if p.is_file()), None)


def _file(name: str) -> Path:
    path = _path(name)
    assert path is not None, f"{name} has no source file"
    return path


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _is_ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == PACKAGE


def _targets(node: ast.ImportFrom) -> list[tuple[str, ast.alias | None]]:
    """The modules that `from x import a, b` names: x itself, or its submodules a and b (with the name they get)."""
    module = str(node.module)
    inside = [(f"{module}.{alias.name}", alias) for alias in node.names]
    bound = _bound(module)
    submodules = [(name, alias) for name, alias in inside if alias.name not in bound and _path(name) is not None]
    if submodules:
        assert len(submodules) == len(inside), f"line {node.lineno}: names and modules in one import of {module}"
        return list(submodules)
    return [(module, None)]


@cache
def _bound(module: str) -> frozenset[str]:
    """The names that a module binds at its top level by imports of names and definitions (they hide submodules)."""
    names: set[str] = set()
    for node in ast.parse(_file(module).read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    return frozenset(names)


def _rewritten(name: str, text: str) -> str:
    """A module's source with its imports changed; everything else stays as it is, line by line."""
    tree = ast.parse(text)
    guarded = {id(x) for node in ast.walk(tree) if isinstance(node, ast.Try) for x in ast.walk(node)}
    lines = text.splitlines()
    edits = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(_is_ours(alias.name) for alias in node.names), f"{name}: use `from {PACKAGE}.x import y`"
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            if _is_ours(node.module):
                edits.append(_relative(node, lines))
                continue
            names = [str(node.module)]
        else:
            continue
        if id(node) not in guarded and any(_is_optional(module) for module in names):
            edits.append(_tried(node, lines))
    for edit in sorted(edits, key=lambda edit: -edit.first):
        lines[edit.first - 1 : edit.last] = edit.lines
    return "\n".join(lines) + "\n"


def _is_optional(module: str) -> bool:
    top = module.split(".")[0]
    return top not in REQUIRED and top not in sys.stdlib_module_names


def _relative(node: ast.ImportFrom, lines: list[str]) -> Edit:
    """`from linearize.a.b import c` as `from .linearize_a_b import c`; modules as modules."""
    first, last = node.lineno, node.end_lineno or node.lineno
    indent = " " * node.col_offset
    targets = _targets(node)
    if targets[0][1] is None:
        head = lines[first - 1].replace(f"from {node.module} import", f"from .{_flat(str(node.module))} import", 1)
        return Edit(first, last, [head, *lines[first:last]])
    made = [f"{indent}from . import {_flat(name)} as {a.asname or a.name}" for name, a in targets if a is not None]
    return Edit(first, last, made)


def _tried(node: ast.stmt, lines: list[str]) -> Edit:
    """An import inside `try`, which transformers does not take for a requirement; it fails as before where it runs."""
    first, last = node.lineno, node.end_lineno or node.lineno
    indent = " " * node.col_offset
    body = [f"    {line}" for line in lines[first - 1 : last]]
    return Edit(first, last, [f"{indent}try:", *body, f"{indent}except ImportError:", f"{indent}    raise"])


def _own_name(text: str, constant: str) -> str:
    """A module with the name of its package at the end of a string constant that it registers globally."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith(f'{constant} = "') and line.endswith('"'):
            lines[i] = f'{line[:-1]}_" + str(__package__).replace(".", "_")'
            return "\n".join(lines) + "\n"
    raise AssertionError(f"no line {constant} = ... to rename")
