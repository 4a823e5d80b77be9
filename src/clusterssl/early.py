"""What a signal does while an entry script still imports: one line and an exit code instead of a traceback or silence.

Imported before torch, which takes seconds; `config.entry` takes over from here.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from clusterssl.errors import EXIT_INTERRUPTED, EXIT_STOPPED

ROOT = Path(__file__).resolve().parents[2]
_MODULES = ("clusterssl.data.pack",)
_before: dict[int, Any] = {}


def hear() -> None:
    """From now on a signal ends this process as the contract says, if it runs an entry script and has not said else."""
    if _run_as_module() not in _MODULES and not _runs_script():
        return
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        handler = signal.getsignal(number)
        if handler in (signal.SIG_DFL, signal.default_int_handler):  # a batch script may have it ignored
            _before[number] = handler
            signal.signal(number, _end)


def _runs_script() -> bool:
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    return script is not None and Path(script).resolve().parent in (ROOT, ROOT / "scripts")


def _run_as_module() -> str:
    """What `python -m` names while it still imports the packages around it."""
    words = sys.orig_argv
    return words[words.index("-m") + 1] if sys.argv[:1] == ["-m"] and "-m" in words else ""


def over() -> None:
    """Signals do again what they did before `hear`: the imports are done."""
    while _before:
        number, handler = _before.popitem()
        signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    interrupted = number == signal.SIGINT
    by = signal.Signals(number).name
    said = "interrupted" if interrupted else f"stopped by {by} before anything began; the same command starts again"
    name = _run_as_module() or Path(sys.argv[0]).name
    os.write(2, f"{name}: {said}\n".encode())
    os._exit(EXIT_INTERRUPTED if interrupted else EXIT_STOPPED)


hear()
