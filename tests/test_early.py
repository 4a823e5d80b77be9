"""Signals while an entry script still imports; a package named torch that sleeps stands in the way of the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import ROOT


def importing(tmp_path: Path, script: str, ignored: signal.Signals | None = None) -> subprocess.Popen[str]:
    """A script, or module, that has begun to import torch."""
    slow = tmp_path / "slow" / "torch"
    slow.mkdir(parents=True)
    (slow / "__init__.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    what = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    process = subprocess.Popen(
        [sys.executable, *what, "--dump_path", "run"], cwd=tmp_path, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": f"{tmp_path / 'slow'}:{ROOT / 'src'}"},
        preexec_fn=(lambda: signal.signal(ignored, signal.SIG_IGN)) if ignored else None,  # type: ignore[arg-type]
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "importing\n"
    return process


STOPPED = "{script}: stopped by {name} before anything began; the same command starts again\n"


@pytest.mark.parametrize("script", ["main_swav.py", "eval_linear.py", "assign.py", "clusterssl.data.pack"])
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "{script}: interrupted\n"),
        (signal.SIGTERM, 75, STOPPED),
        (signal.SIGUSR1, 75, STOPPED),
        (signal.SIGUSR2, 75, STOPPED),
    ],
    ids=str,
)
def test_a_signal_during_the_imports_is_one_line(
    script: str, number: signal.Signals, code: int, said: str, tmp_path: Path
) -> None:  # fmt: skip
    process = importing(tmp_path, script)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (code, said.format(script=script, name=number.name))
    assert not (tmp_path / "run").exists()


def test_what_a_batch_script_ignores_stays_ignored(tmp_path: Path) -> None:
    process = importing(tmp_path, "main_swav.py", ignored=signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in process.communicate(timeout=30)[1] and process.returncode == 75


def test_every_script_hears_signals_before_it_imports_torch() -> None:
    """In each, the first import of the package is one that installs the handlers, and torch comes later."""
    for script in sorted(ROOT.glob("*.py")):
        text = script.read_text()
        if "entry(main)" not in text:
            continue
        ours = min(at for word in ("import clusterssl.early", "from clusterssl import config", "from clusterssl.config")
                   if (at := text.find(f"\n{word}")) >= 0)  # fmt: skip
        theirs = text.find("\nimport torch")
        assert theirs == -1 or ours < theirs, script.name
        assert text.find("\nfrom clusterssl") >= 0 and ours <= text.find("\nfrom clusterssl"), script.name


def test_only_entry_scripts_are_changed(tmp_path: Path) -> None:
    """Programs that use the package keep their handlers; so does a script once its imports are done."""
    program = "import sys, signal; sys.path.insert(0, sys.argv[1]); import clusterssl.config as c; "
    asked = "print([signal.getsignal(n) for n in (2, 15)] == [signal.default_int_handler, signal.SIG_DFL])"
    other = tmp_path / "other.py"
    other.write_text(f"{program}\n{asked}\n")
    for words in (["-c", program + asked], [str(other)]):
        done = subprocess.run([sys.executable, *words, str(ROOT / "src")], capture_output=True, text=True, check=True)
        assert done.stdout == "True\n"
