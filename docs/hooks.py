"""What `make docs` does beyond mkdocs: pages of the source files that documents link to, and of the public modules.

A document links to a file outside docs/ as on a code forge, `../main_swav.py`; with the name of a function or class,
`../main_swav.py#swapped_prediction`, the site leads to its line. Links that lead nowhere end the build.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()\.\./([^)#\s]+)(?:#([^)\s]+))?(?=\))")
LANGUAGES = {".py": "python", ".sh": "bash", ".json": "json", ".md": "markdown", ".toml": "toml"}
PUBLIC = (
    *("cluster.sinkhorn", "cluster.online", "cluster.queue", "cluster.kmeans", "cluster.transport", "cluster.pca"),
    *(
        "cluster.power_iteration",
        "cluster.two_softmax",
        "cluster.neighbour_queue",
        "cluster.memory",
        "method",
        "engine",
    ),
    *("monitor", "run", "dist", "config", "options", "optim", "data.source", "data.loader", "data.augment"),
    *("models.build", "models.weights", "models.export", "hub", "evals.features", "evals.knn", "evals.clustering"),
)
"""modules of the reference"""


def line_of(path: Path, symbol: str) -> int:
    """Line on which a function, class, method or constant of this name is defined.

    Raises:
        LookupError: the file defines no such name.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [getattr(node, "name", "")] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        if symbol in names:
            return node.lineno  # type: ignore[attr-defined]
    raise LookupError(f"{path.relative_to(ROOT)} defines no {symbol}")


def linked(text: str) -> list[tuple[str, str]]:
    """Files outside docs/ that a document links to, from the root, and the names in them."""
    return [(match.group(1), match.group(2) or "") for match in LINK.finditer(text)]


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every linked file and for every public module."""
    pages = [file for file in files.documentation_pages() if file.src_uri.count("/") == 0]
    names = {name for page in pages for name, _ in linked(page.content_string)}
    for name in sorted(names):
        path = ROOT / name
        if not path.is_file():
            raise PluginError(f"a document links to {name}, which is no file")
        fence, language = "`" * 6, LANGUAGES.get(path.suffix, "text")
        text = f'# {name}\n\n{fence}{language} linenums="1"\n{path.read_text(encoding="utf-8").rstrip()}\n{fence}\n'
        files.append(File.generated(config, f"source/{name}.md", content=text))
    rows = "\n".join(f"- [`clusterssl.{name}`](reference/{name}.md)" for name in PUBLIC)
    files.append(File.generated(config, "reference.md", content=f"# Modules\n\nFrom the docstrings.\n\n{rows}\n"))
    for name in PUBLIC:
        text = f"# {name}\n\n::: clusterssl.{name}\n"
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to files of the repository to their pages."""
    if page.file.generated_by:
        return markdown

    def target(match: re.Match[str]) -> str:
        name, symbol = match.group(1), match.group(2)
        try:
            anchor = f"?line={line_of(ROOT / name, symbol)}" if symbol else ""
        except LookupError as error:
            raise PluginError(f"{page.file.src_uri}: {error}") from error
        return f"source/{name}.md{anchor}"

    return LINK.sub(target, markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """From the number of a line to its place; mkdocs cannot check that one, `line_of` has."""
    return re.sub(r'(href="[^"]*\.html)\?line=(\d+)"', r'\1#__codelineno-0-\2"', output)
