"""Runs a training whose images take so many seconds each to be read: slow_start.py SECONDS SCRIPT FLAGS."""

from __future__ import annotations

import runpy
import sys
import time
from typing import Any

from clusterssl.data import resident

if __name__ == "__main__":
    seconds, resident._PIECE_IMAGES = float(sys.argv[1]), 4
    original = resident._Decoded._pieces

    def slow(self: Any, positions: Any) -> Any:
        for piece in original(self, positions):
            print("reading", flush=True)
            time.sleep(seconds * len(piece.positions))
            yield piece

    resident._Decoded._pieces = slow  # type: ignore[method-assign]
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
