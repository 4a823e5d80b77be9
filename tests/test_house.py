"""The house around the code: pins, scripts, documents, and what must not be in a public repository."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tracked() -> list[Path]:
    """Text files under version control; all files below the root where there is no repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    names = [name for name in listed.stdout.split("\0") if name]
    if listed.returncode:
        pytest.skip("not a git checkout")
    binary = {".npz", ".png", ".jpg", ".jpeg", ".gif", ".pth", ".tar", ".gz"}
    return [ROOT / name for name in names if Path(name).suffix not in binary and (ROOT / name).is_file()]


def test_constraints_are_names_and_versions() -> None:
    pin = re.compile(r"[a-z0-9][a-z0-9.-]*==[0-9][0-9a-z.]*(; python_version (<|>=) '3\.\d+')?")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines == sorted(lines)
    for line in lines:
        assert pin.fullmatch(line), line


def test_constraints_pin_every_direct_dependency() -> None:
    pinned = {re.split("==", line)[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    wanted = re.findall(r'"([A-Za-z][\w-]*)>=', (ROOT / "pyproject.toml").read_text())
    assert {name.lower() for name in wanted} - {"setuptools"} <= pinned


def test_shell_scripts_begin_with_their_shebang() -> None:
    scripts = [path for path in tracked() if path.suffix in (".sh", ".sbatch") or path.parent.name == ".ci"]
    assert scripts
    for path in scripts:
        assert path.read_text().startswith("#!"), f"{path.name}: sbatch wants the shebang on line 1"
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0, path.name


def test_no_machine_paths_and_no_registry_addresses() -> None:
    registries = "|".join(("py" + "pi", "python" + "hosted", "npm" + "js", "download." + "pytorch"))
    forbidden = re.compile(rf"https?://[^/ ]*({registries})|(^|[\s\"'=:(])/(work|root|home|Users)/\w")
    for path in tracked():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert not forbidden.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"


def readme_commands() -> list[str]:
    """Command lines of the README's shell blocks, continuation lines joined, comments cut."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, flags=re.S)
    lines = (line.split(" #")[0].strip().removeprefix("$ ") for block in blocks for line in block.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def test_readme_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    commands = readme_commands()
    assert {"make demo", "make test"} <= set(commands)
    for command in commands:
        words = shlex.split(command)
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, command
        for word in words:
            if word.endswith((".py", ".sh")) and not word.startswith(("/", "<")):
                assert (ROOT / word).is_file(), f"{command}: no {word}"


def test_readme_links_lead_somewhere() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)|<img [^>]*src=\"([^\"]+)\"", text):
            link = target[0] or target[1]
            assert link.startswith("http") or (ROOT / link).exists(), f"{document}: {link}"


def test_make_without_a_usable_python_says_so_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n')
    old.chmod(0o755)

    def said(python: str) -> list[str]:
        command = ["make", "test", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode != 0 and not (tmp_path / "venv").exists()
        return [line for line in done.stderr.splitlines() if not line.startswith("make")]

    assert said(str(old)) == [
        "error: Python 3.8.1 is too old, 3.10 or newer is needed; name one: make PYTHON=python3.11"
    ]
    assert said("no-such-python") == [
        "error: no-such-python not found; install Python 3.10 or newer, or name one: make PYTHON=python3.11"
    ]


def test_a_second_make_installs_nothing(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / ".installed").touch()
    planned = subprocess.run(
        ["make", "-n", "test", f"VENV={venv}"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "pytest" in planned and "pip" not in planned
