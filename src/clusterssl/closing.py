"""The page of a finished run, made by a process of its own: it may fail, hang or grow and harms nothing.

It needs no GPU and begins when the ranks have parted, so that nobody waits for it but the job's end.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clusterssl import child
from clusterssl.errors import UserError
from clusterssl.preemption import StopRequest

logger = logging.getLogger(__name__)

LIMIT_S = 180.0
"""seconds after which the process ends, at whatever it is"""
READING_S = 60.0
"""seconds for which it reads images; it shows what it has seen by then"""
MEMORY = 8 << 30
"""bytes that it may allocate"""
LARGEST_CHECKPOINT = 2 << 30
"""bytes of a checkpoint above which the page goes without clusters"""
PAGE, CHECKPOINT = "report.html", "checkpoint.pth.tar"


def close_with_page(folder: Path) -> None:
    """Write the page of a run that has ended, unless it is newer than the checkpoint; never raises, ends in time.

    Args:
        folder: run directory.
    """
    page, checkpoint = folder / PAGE, folder / CHECKPOINT
    try:
        if page.exists() and page.stat().st_mtime >= checkpoint.stat().st_mtime:
            return
        problem = _make(folder)
    except OSError as error:
        problem = str(error)
    if problem:
        logger.info("%s; python report.py %s makes it again", problem, folder)
    if page.exists():
        logger.info("report: %s", page)


def _make(folder: Path) -> str:
    """What went wrong, in words, or nothing."""
    logger.info("writing %s; Ctrl-C leaves it out", folder / PAGE)
    words = [sys.executable, "-m", "clusterssl.closing", str(folder), str(os.getpid())]
    end = time.monotonic() + LIMIT_S
    with StopRequest() as request, tempfile.TemporaryFile() as said:
        maker = subprocess.Popen(words, env=child.environment(), stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            while maker.poll() is None:
                if request.received or time.monotonic() > end:
                    return f"the report was left unfinished ({request.received or f'after {LIMIT_S:.0f} s'})"
                time.sleep(0.05)
        finally:
            maker.kill()
            maker.wait()
        said.seek(0)
        last = said.read().decode(errors="replace").strip().splitlines()[-1:]
    return f"the report is not whole ({' '.join(last) or f'exit code {maker.returncode}'})" if maker.returncode else ""


def bound(parent: int) -> None:
    """Let this process end with its parent, with its time, or when it asks for too much memory."""
    with contextlib.suppress(AttributeError):  # outside Linux
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit("the run has ended")
    signal.alarm(int(LIMIT_S) + 1)
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY if most < 0 else min(MEMORY, most), most))


def main() -> None:
    """Write the page without clusters, which takes a moment, and then once more with them."""
    folder = Path(sys.argv[1])
    bound(int(sys.argv[2]))
    from clusterssl.report import write_report

    write_report([folder], folder / PAGE)
    if (folder / CHECKPOINT).stat().st_size > LARGEST_CHECKPOINT:
        return
    from clusterssl.labelling.sample import run_galleries

    galleries = run_galleries(folder, seconds=READING_S)
    if galleries:
        write_report([folder], folder / PAGE, galleries=galleries)


if __name__ == "__main__":
    try:
        main()
    except UserError as problem:
        sys.exit(str(problem))
