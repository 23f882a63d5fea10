"""Write docs/api.md from the docstrings of all public names: `python -m scripts.api_page`.

`tests/test_api_page.py` fails where the page is not what this writes.
"""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from scripts.api_examples import EXAMPLES, PRELUDE

import linearize

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
METHODS = {
    "Recipe": ("from_data", "override", "to_yaml"),
    "Plan": ("resolve",),
    "LinearizedForCausalLM": (
        "from_teacher", "convert_layers", "forward", "mixers", "mixer_parameters", "set_store", "keep_heads",
        "push_to_hub",
    ),
}  # fmt: skip
HEAD = """# Python interface

Everything here is an attribute of `linearize`, imported when it is first used. This page is made from the docstrings
by `python -m scripts.api_page`; do not edit it. The examples run in this order, in a folder with some stories in
`stories.txt` and `other_stories.txt`, after

```python
{prelude}
```

A callback of `convert` is an object with any of these methods; one that returns True stops the run, and the same call
continues it.

| method | argument |
|---|---|
| `on_step(step)` | `Step`: {step} |
| `on_evaluate(evaluation)` | `Evaluation`: {evaluation} |
| `on_stage_end(result)` | `StageResult`: {result} |

Mixers, stages and exports of other packages: `examples/elu_linear.py` in the repository is a whole mixer in one file,
with the entry point that lets every command find it.
"""
WIDTH = 120


def page() -> str:
    """The whole page."""
    from linearize.training.callbacks import Evaluation, Step
    from linearize.training.loop import StageResult

    fields = {
        name: ", ".join(f"`{field}`" for field in cls.__dataclass_fields__)
        for name, cls in (("step", Step), ("evaluation", Evaluation), ("result", StageResult))
    }
    parts = [HEAD.format(prelude=PRELUDE.strip(), **fields), *(section(name) for name in EXAMPLES)]
    return "\n".join(parts)


def section(name: str) -> str:
    """One public name: signature, docstring, fields or methods, example."""
    thing = getattr(linearize, name)
    if name == "recipes":
        thing = linearize.recipes.schema.recipes
    lines = [f"## {name}", ""]
    if inspect.isfunction(thing):
        lines += ["```python", *signature(name, thing), "```", ""]
    lines += [*prose(thing), ""]
    if inspect.isclass(thing) and issubclass(thing, BaseModel):
        lines += [*fields_table(thing), ""]
    for method in METHODS.get(name, ()):
        function = getattr(thing, method)
        lines += ["```python", *signature(f"{name}.{method}", function), "```", "", *prose(function), ""]
    return "\n".join([*lines, "```python", EXAMPLES[name].strip(), "```", ""])


def signature(name: str, function: Any) -> list[str]:
    """A call with its defaults, one parameter a line where one line is too long."""
    made = inspect.signature(function)
    parameters = [p for p in made.parameters.values() if p.name not in ("self", "cls")]
    texts: list[str] = []
    keyword = False
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword:
            texts.append("*")
            keyword = True
        texts.append(str(parameter))
    returns = made.return_annotation
    end = "" if returns is inspect.Signature.empty else f" -> {returns}"
    line = f"{name}({', '.join(texts)}){end}"
    if len(line) <= WIDTH:
        return [line]
    return [f"{name}(", *(f"    {text}," for text in texts), f"){end}"]


def prose(thing: Any) -> list[str]:
    """A docstring as Markdown: its sections `Args` and `Raises` as lists."""
    lines: list[str] = []
    listed = False
    for line in (inspect.getdoc(thing) or "").splitlines():
        if line in ("Args:", "Raises:"):
            lines, listed = [*lines, f"{line[:-1]}:", ""], True
        elif listed and line.startswith("    ") and not line.startswith("     "):
            names, colon, rest = line.strip().partition(": ")
            lines.append(f"- `{names}`: {rest}" if colon else f"- {line.strip()}")
        elif listed and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
    return lines


def fields_table(model: type[BaseModel]) -> list[str]:
    """The fields of a config with their defaults."""
    rows = ["| field | default | |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else f"`{default_of(field)!r}`"
        rows.append(f"| `{name}` | {default} | {textwrap.shorten(field.description or '', 200)} |")
    return rows


def default_of(field: Any) -> Any:
    """A field's default, made where it has a factory."""
    if field.default is not PydanticUndefined:
        return field.default
    made = field.default_factory()
    return made if not isinstance(made, BaseModel) else type(made).__name__


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
