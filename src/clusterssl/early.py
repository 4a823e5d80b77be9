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
_before: dict[int, Any] = {}


def hear() -> None:
    """From now on a signal ends this process as the contract says, if it runs an entry script and has not said else."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None or Path(script).resolve().parent not in (ROOT, ROOT / "scripts"):
        return
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        handler = signal.getsignal(number)
        if handler in (signal.SIG_DFL, signal.default_int_handler):  # a batch script may have it ignored
            _before[number] = handler
            signal.signal(number, _end)


def over() -> None:
    """Signals do again what they did before `hear`: the imports are done."""
    while _before:
        number, handler = _before.popitem()
        signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    interrupted = number == signal.SIGINT
    name = signal.Signals(number).name
    said = "interrupted" if interrupted else f"stopped by {name} before anything began; the same command starts again"
    os.write(2, f"{Path(sys.argv[0]).name}: {said}\n".encode())
    os._exit(EXIT_INTERRUPTED if interrupted else EXIT_STOPPED)


hear()
