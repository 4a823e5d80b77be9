"""Runs a training on a slow disk, full for rank 1 after so many files: slow_disk.py SECONDS COUNT SCRIPT FLAGS."""

from __future__ import annotations

import errno
import os
import runpy
import sys
import time

if __name__ == "__main__":
    real, seconds, left = os.fsync, float(sys.argv[1]), int(sys.argv[2])

    def fsync(descriptor: int) -> None:
        global left
        time.sleep(seconds)
        left -= os.environ.get("RANK") == "1"
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    os.fsync = fsync
    sys.argv = sys.argv[3:]
    runpy.run_path(sys.argv[0], run_name="__main__")
