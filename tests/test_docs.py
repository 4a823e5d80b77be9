"""The documentation names only what exists: flags, files, links, messages, sections, and figures' numbers."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from clusterssl import config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
FOREIGN = {
    *(
        "nproc_per_node",
        "max_restarts",
        "signals_to_handle",
        "signal",
        "partition",
        "cpus_per_task",
        "directory",
        "logdir",
    ),  # torchrun, sbatch, http.server, tensorboard
    *("cos", "imagenet_path", "sgd", "lars", "wd"),
}
"""flags of other programs, and of published code that pages say is different here"""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


@cache
def known_flags() -> set[str]:
    """Names of all flags: fields of the dataclasses and words of argparse, read from the source."""
    found: set[str] = set()
    for path in [*ROOT.glob("*.py"), *(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").glob("*.py"),
                 *(ROOT / "bench").glob("*.py")]:  # fmt: skip
        source = text_of(path)
        found |= set(re.findall(r"add_argument\(\s*\"--([\w-]+)\"", source))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(word) for word in node.decorator_list):
                found |= {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)
                          and isinstance(item.target, ast.Name)}  # fmt: skip
            if isinstance(node, ast.Dict):  # names of other vocabularies that are translated
                found |= {
                    key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)
                }
    return {name.replace("-", "_") for name in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page: Path) -> None:
    named = {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", text_of(page))}
    assert named - known_flags() - FOREIGN == set()


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Entry scripts and their words in the shell blocks of a page; a script of scripts/ stands for what it starts."""
    for line in "".join(blocks(text_of(page), "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for at, word in enumerate(words):
            if (ROOT / word).is_file() and word.endswith(".py") and "/" not in word:
                yield word, words[at + 1 :]
                break
            if re.fullmatch(r"scripts/\w+\.sh", word):
                (main,) = set(re.findall(r"\w+\.py", text_of(ROOT / word)))
                yield main, words[at + 1 :]
                break


class ParsedError(Exception):
    """The flags of a script were understood."""


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the flags of the very script; what Slurm and torchrun are told stands before its name."""
    parse = config.parse

    def only_parse(*args: Any, **more: Any) -> None:
        parse(*args, **more)
        raise ParsedError

    monkeypatch.setattr(config, "parse", only_parse)
    found = [(script, words) for script, words in commands(page) if script != "report.py"]
    assert found or "```bash" not in text_of(page)
    for script, words in found:
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(ParsedError):
            importlib.import_module(script.removesuffix(".py")).main()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_exist(page: Path) -> None:
    for name in re.findall(r"\b(?:python|bash|sbatch|torchrun)\s(?:-[^\s]+\s)*([\w./]+\.(?:py|sh))\b", text_of(page)):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`((?:scripts|bench|tests|docs)/[\w./-]+\.\w+)`", text_of(page)):
        assert (ROOT / name).exists(), name
    for module in re.findall(r"python -m (clusterssl[\w.]*)", text_of(page)):
        path = ROOT / "src" / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def anchors(page: Path) -> set[str]:
    """Fragments of a page's headings, as code forges and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M), flags=re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def defined(path: Path) -> set[str]:
    """Names of functions, classes and constants of a source file."""
    names = set(re.findall(r"^\s*(?:def|class) (\w+)", text_of(path), flags=re.M))
    return names | set(re.findall(r"^(\w+)(?::[^=\n]+)? = ", text_of(path), flags=re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith("http"):
            continue
        name, _, fragment = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), target
        if fragment and file.suffix == ".md":
            assert fragment in anchors(file), target
        elif fragment:
            assert fragment in defined(file), target


@cache
def messages() -> str:
    """All text of the library in which a message may stand, string pieces joined, whatever is formatted in as dots."""
    pieces: list[str] = []
    for path in [*ROOT.glob("*.py"), *(ROOT / "src").rglob("*.py")]:
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values]
                pieces.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                pieces.append(re.sub(r"%[\d.+]*[a-z]", "...", node.value).replace("%%", "%"))
    return "\n".join(pieces)


def fragments(line: str) -> Iterator[str]:
    """Pieces of a quoted message between its dots that are long enough to tell."""
    for piece in line.split("..."):
        yield from (part.strip(" ();:,.") for part in re.split(r"; |, |: ", piece) if len(part.strip(" ();:,.")) > 7)


def test_quoted_messages_are_ours() -> None:
    said = re.sub(r"\s+", " ", messages())
    lines = [line for block in blocks(text_of(ROOT / "docs/TROUBLESHOOTING.md"), "text") for line in block.splitlines()]
    assert len(lines) > 20
    for line in lines:
        for piece in fragments(line):
            assert piece in said, f"{line}: nothing says {piece!r}"


def test_figures_are_drawn_by_code_and_shown() -> None:
    shown = {name for page in PAGES for name in re.findall(r"\]\(figures/([\w.]+)\)", text_of(page))}
    assert shown == {path.name for path in (ROOT / "docs" / "figures").glob("*.svg")}


def test_verdicts_in_the_gallery_were_printed() -> None:
    found = json.loads((ROOT / "docs/figures/diagnosis.json").read_text())
    page = text_of(ROOT / "docs/DIAGNOSIS.md")
    said = [line for run in found.values() for line in [*run["printed"], *run["report"]]]
    for line in "".join(blocks(page, "text")).splitlines():
        assert any(whole.startswith(line) for whole in said), line
    assert "".join(blocks(page, "bash")).splitlines() == [run["command"] for run in found.values()]


@pytest.mark.slow
def test_the_idea_is_drawn_as_committed(tmp_path: Path) -> None:
    script = f"import sys; sys.path.insert(0, 'docs'); import figures, drawing, json, pathlib; \
drawing.keep.__defaults__ = (pathlib.Path({str(tmp_path)!r}),); print(json.dumps(figures.computed()))"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    kept = json.loads((ROOT / "docs/figures/idea.json").read_text())
    assert numbers(json.loads(done.stdout)) == pytest.approx(numbers(kept), abs=0.02, rel=0.02)
    drawn, shown = ({path.name for path in folder.glob("*.svg")} for folder in (tmp_path, ROOT / "docs/figures"))
    assert drawn == {name for name in shown if not name.startswith("run_")}


def numbers(tree: object) -> list[float]:
    """All numbers of nested dictionaries and lists."""
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    return [float(tree)] if parts is None else [x for part in parts for x in numbers(part)]  # type: ignore[arg-type]


def test_the_idea_in_numbers() -> None:
    found = json.loads((ROOT / "docs/figures/idea.json").read_text())
    assert found["equal"]["transport"] == [100] * 10 and sum(found["equal"]["nearest"]) == 1000
    assert sum(found["pixels"]["sizes"]) == 1000
    plans = [found["epsilon"][key] for key in ("1", "0.2", "0.05", "0.01")]
    entropies = [plan["entropy"] for plan in plans]
    assert entropies == sorted(entropies, reverse=True) and entropies[0] < found["epsilon"]["ln_k"]
    assert all(plan["share_error"] < 0.05 for plan in plans)
    for errors in found["iterations"].values():
        assert errors == sorted(errors, reverse=True)
    shares = list(found["queue"].values())
    assert shares == sorted(shares)


def test_numbers_in_the_text_are_those_of_the_figures() -> None:
    kept = json.loads((ROOT / "docs/figures/idea.json").read_text())
    page = text_of(ROOT / "docs/IDEA.md")
    for name, plan in kept["epsilon"].items():
        if name != "ln_k":
            assert f"| {name} | {plan['entropy']:g} | {plan['largest']:g} |" in page
    said = [
        f"is {kept['pixels']['nmi']:g} %",
        f"{kept['queue']['0']:.0%}"[:-1] + " % get the prototype",
        f"pair, {kept['swapped']['loss']:g} here",
        f"{kept['iterations']['0.05'][2]:.0%}"[:-1] + " % off",
    ]
    for words in said:
        assert words in page, words
