"""The documentation site: links, pages made from other files, the notebook, the citation."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from scripts import site_hooks
from scripts.run_notebook import run_cells

from linearize.recipes import load_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOK = DOCS / "quickstart.ipynb"


# pages


def test_links_of_the_repository_become_links_of_the_site() -> None:
    text = (
        "[a](methods.md#x) [b](../README.md) [c](../benchmarks/README.md#y) `[d](../README.md)` [e](https://f.g/h.md)"
    )
    assert site_hooks.rewrite(text, "scale.md") == (
        "[a](methods.md#x) [b](index.md) [c](benchmarks/README.md#y) `[d](../README.md)` [e](https://f.g/h.md)"
    )
    text = (
        "[a](../docs/log.md) [b](peers/README.md) [c](quality) ![d](peers/../speculation/deep_student.svg) [e](no.md)"
    )
    assert site_hooks.rewrite(text, "benchmarks/README.md") == (
        "[a](../log.md) [b](peers/README.md) c ![d](speculation/deep_student.svg) [e](no.md)"
    )
    assert site_hooks.rewrite("[a](../src/linearize/recipes)", "index.md") == "[a](recipes.md)"


def test_the_navigation_has_what_exists_and_the_rest_is_listed() -> None:
    nav = [{"Home": "index.md"}, {"In": [{"A": "scale.md"}, {"B": "none.md"}]}, {"C": "none.md"}]
    nav = site_hooks.on_config(SimpleNamespace(nav=nav)).nav
    assert nav[:2] == [{"Home": "index.md"}, {"In": [{"A": "scale.md"}]}] and list(nav[2]) == ["More"]
    assert {"methods.md", "recipes.md", "benchmarks/README.md"} <= set(nav[2]["More"])
    names = site_hooks._names(nav)
    assert len(names) == len(set(names)) and {page.name for page in DOCS.glob("*.md")} <= set(names)


def test_every_recipe_is_on_the_page_of_recipes() -> None:
    page = site_hooks.recipes_page()
    assert re.findall(r"^## (\S+)", page, re.MULTILINE) == recipe_names()
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert [yaml.safe_load(block)["description"] for block in blocks] == [
        load_recipe(n).description for n in recipe_names()
    ]


def test_every_verb_is_on_the_page_of_the_command_line() -> None:
    page = site_hooks.command_page()
    verbs = re.findall(r"^## linearize (\S+)", page, re.MULTILINE)
    assert {"demo", "convert", "eval", "doctor", "recipes", "verify"} <= set(verbs)
    assert "--set KEY=VALUE" in page and page.count("Usage: linearize") == 1 + len(verbs)


@pytest.mark.slow
def test_the_site_builds_and_a_broken_link_does_not(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="mkdocs-material is not installed (make docs brings it)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    index = (tmp_path / "site" / "index.html").read_text("utf-8")
    assert "fonts.googleapis" not in index and 'href="quickstart/"' in index
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "*.safetensors", "__pycache__")
    )
    with (copy / "docs" / "recall.md").open("a") as page:
        page.write("\n[a](none.md) [b](methods.md#none) [c](../benchmarks/none.json)\n")
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "3 warnings" in done.stderr + done.stdout


# the notebook


def test_the_notebook_has_outputs_and_ran_in_order() -> None:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(output["output_type"] == "stream" for cell in code for output in cell["outputs"])
    page = site_hooks.notebook_page(NOTEBOOK)
    assert page.count("```python") == len(code) and page.count("```text") == sum(bool(c["outputs"]) for c in code) >= 5


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    before = json.dumps([cell["source"] for cell in notebook["cells"]])
    namespace = run_cells(notebook)
    report = namespace["report"]
    assert report["student_loss"] < report["swap_loss"] - 0.05 and report["student_loss"] - report["teacher_loss"] < 0.2
    assert "Once upon a time" in "".join(str(cell.get("outputs")) for cell in notebook["cells"])
    assert json.dumps([cell["source"] for cell in notebook["cells"]]) == before


# the citation


def test_the_citation_is_complete_and_of_this_version() -> None:
    data = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert data["cff-version"] == "1.2.0" and data["type"] == "software"
    assert all(isinstance(data[key], str) and data[key] for key in ("message", "title", "abstract", "license"))
    assert (data["version"], data["license"]) == (project["version"], project["license"])
    assert data["authors"] == [{"name": "The linearize authors"}]
    allowed = {
        "cff-version",
        "message",
        "type",
        "title",
        "abstract",
        "authors",
        "version",
        "license",
        "keywords",
        "references",
    }
    assert set(data) <= allowed
    for reference in data["references"]:
        assert set(reference) == {"type", "title", "authors", "year", "url"} and isinstance(reference["year"], int)
        assert all(set(author) == {"family-names", "given-names"} for author in reference["authors"])
        assert reference["url"].rpartition("/")[2] in (ROOT / "README.md").read_text("utf-8")
