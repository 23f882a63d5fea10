"""Hooks of mkdocs: pages that are made from other files of the repository, and links that lead out of `docs/`.

- `quickstart.md` is the notebook `docs/quickstart.ipynb` with its outputs, `recipes.md` is made from the recipes' YAML,
  `cli.md` from `linearize --help` and that of each command.
- A link to a file outside `docs/` works on the site too: pages become pages, other files are copied, and a link to a
  folder, which a site does not have, becomes text.
- An entry of the navigation without a file is left out, and a page in no entry is listed under More.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RECIPES = ROOT / "src" / "linearize" / "recipes"
PLACES = {"README.md": "index.md", "docs/quickstart.ipynb": "quickstart.md", "src/linearize/recipes": "recipes.md"}
"""Files and folders of the repository that a page of the site shows."""
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)


def on_config(config: Any) -> Any:
    """Fit the navigation to the pages that there are."""
    generated = {"quickstart.md", "recipes.md", "cli.md", *(site for site, _ in _outside_pages())}
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | generated
    config.nav = [entry for entry in (_existing(entry, pages) for entry in config.nav) if entry]
    if rest := sorted(pages - set(_names(config.nav))):
        config.nav.append({"More": rest})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add what is generated, and the files outside `docs/` that pages link to."""
    from mkdocs.structure.files import File

    content = {
        "quickstart.md": notebook_page(DOCS / "quickstart.ipynb"),
        "recipes.md": recipes_page(),
        "cli.md": command_page(),
    }
    content |= {site: path.read_text("utf-8") for site, path in _outside_pages()}
    for name, text in content.items():
        files.append(File.generated(config, name, content=text))
    for path in sorted(_outside_files()):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    return rewrite(markdown, page.file.src_uri)


def rewrite(markdown: str, site: str) -> str:
    """The text of a page at `site` with the links of its source in the repository led to the site's files."""
    source = _source(site)
    parts = _FENCE.split(markdown)

    def link(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups()
        path = (source.parent / target).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            return match[0]
        if path.is_dir() and _site(path) not in PLACES.values():
            return text
        return f"{mark}[{text}]({posixpath.relpath(_site(path), posixpath.dirname(site) or '.')}{anchor or ''})"

    return "".join(part if number % 2 else _LINK.sub(link, part) for number, part in enumerate(parts))


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: code, and what it printed."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        printed = "".join("".join(output.get("text", ())) for output in cell["outputs"])
        parts += [f"```text\n{printed.rstrip()}\n```"] if printed else []
    return "\n\n".join([*parts, "This page is the notebook `docs/quickstart.ipynb`.", ""])


def recipes_page() -> str:
    """Every packaged recipe: what it is, where its numbers come from, and its YAML."""
    recipes = {
        path.stem: path.read_text("utf-8") for path in sorted(RECIPES.glob("*.yaml"), key=lambda path: path.stem)
    }
    data = {name: yaml.safe_load(text) for name, text in recipes.items()}
    lines = [
        "# Recipes",
        "",
        "`linearize recipes` lists them, `linearize recipes NAME > my.yaml` writes one with every default, which",
        "`convert --recipe my.yaml` takes back. Editors complete and check the file by its first line, which names the",
        "JSON schema of the installation (`linearize recipes --schema`).",
        "",
        "| recipe | student |",
        "|---|---|",
        *(f"| [`{name}`](#{_anchor(name)}) | {recipe['description']} |" for name, recipe in data.items()),
    ]
    for name, recipe in data.items():
        body = recipes[name]
        lines += ["", f"## {name} {{ #{_anchor(name)} }}", "", recipe["description"], "", str(recipe["source"]).strip()]
        lines += ["", f"```yaml\n{body.rstrip()}\n```"]
    return "\n".join([*lines, ""])


def command_page() -> str:
    """The help of the command and of each of its verbs, as printed."""
    overview = _help()
    verbs = re.findall(r"^  ([a-z]+)  ", overview.partition("\n\n  ")[2].partition("\n\n")[2], re.MULTILINE)
    lines = ["# Command line", "", "Exit codes: 0 done, 1 the work failed, 2 bad usage or input, 130 interrupted."]
    lines += ["", f"```text\n{overview}\n```"]
    for verb in verbs:
        lines += ["", f"## linearize {verb}", "", f"```text\n{_help(verb)}\n```"]
    return "\n".join([*lines, ""])


def _help(*verb: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "100"}
    command = [sys.executable, "-m", "linearize", *verb, "--help"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.rstrip()


def _anchor(name: str) -> str:
    return name.replace(".", "-")


def _outside_pages() -> list[tuple[str, Path]]:
    """Pages outside `docs/` that are on the site: those that pages link to, and their own."""
    seen: dict[str, Path] = {}
    open_pages = sorted(DOCS.rglob("*.md"))
    while open_pages:
        page = open_pages.pop()
        for path in _targets(page):
            site = _site(path)
            if path.suffix == ".md" and not path.is_relative_to(DOCS) and site not in {*seen, *PLACES.values()}:
                seen[site] = path
                open_pages.append(path)
    return sorted(seen.items())


def _outside_files() -> set[Path]:
    """Other files outside `docs/` that pages of the site link to."""
    pages = [*DOCS.rglob("*.md"), *(path for _, path in _outside_pages())]
    targets = {path for page in pages for path in _targets(page)}
    return {path for path in targets if path.suffix != ".md" and not path.is_relative_to(DOCS)}


def _targets(page: Path) -> set[Path]:
    """The files of the repository that a page links to."""
    text = "".join(_FENCE.split(page.read_text("utf-8"))[::2])
    paths = {(page.parent / match[3]).resolve() for match in _LINK.finditer(text)}
    return {path for path in paths if path.is_file() and path.is_relative_to(ROOT)}


def _site(path: Path) -> str:
    """Where a file of the repository is on the site."""
    name = path.relative_to(ROOT).as_posix()
    return PLACES.get(name, name.removeprefix("docs/"))


def _source(site: str) -> Path:
    """The file of the repository that a page of the site is made from."""
    outside = ROOT / site
    return outside if outside.is_file() and not (DOCS / site).exists() else DOCS / site


def _existing(entry: Any, pages: set[str]) -> Any:
    """An entry of the navigation without what does not exist; None where nothing is left."""
    if isinstance(entry, str):
        return entry if entry in pages else None
    ((title, below),) = entry.items()
    if isinstance(below, str):
        return entry if below in pages else None
    left = [each for each in (_existing(each, pages) for each in below) if each]
    return {title: left} if left else None


def _names(nav: list[Any]) -> list[str]:
    """All pages of a navigation."""
    names: list[str] = []
    for entry in nav:
        if isinstance(entry, str):
            names.append(entry)
        else:
            for below in entry.values():
                names += [below] if isinstance(below, str) else _names(below)
    return names
