"""Whether a folder is the same one on all nodes; a run whose nodes write to different disks cannot be resumed."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from pathlib import Path

from clusterssl import dist
from clusterssl.files import first_line

PATIENCE_S = 20.0
"""seconds that a network file system may take to show a new file on another node"""


def why_not_shared(folder: Path) -> str:
    """Let each node write a file and look for those of the others; called by all ranks.

    Returns:
        Why the folder cannot be used, the same in all ranks; empty if it can. A run on one node is not checked.
    """
    host = socket.gethostname()
    hosts = dist.gather_objects(host)
    leaders = {name: hosts.index(name) for name in hosts}
    if len(leaders) == 1:
        return ""
    nonce = dist.broadcast_object(f".nonce-{secrets.token_hex(8)}")
    leads, mine = leaders[host] == dist.rank(), folder / f"{nonce}.{dist.rank()}"
    problem = dist.first_problem(_write(mine) if leads else "")
    if not problem:
        problem = dist.first_problem(
            _look(folder, {name: f"{nonce}.{rank}" for name, rank in leaders.items()}) if leads else ""
        )
    with contextlib.suppress(OSError):
        mine.unlink(missing_ok=True)
    return f"--dump_path {folder}: {problem}; choose a folder that all nodes share and may write to" if problem else ""


def _write(path: Path) -> str:
    try:
        path.touch()
    except OSError as error:
        return f"cannot be written on {socket.gethostname()} ({first_line(error)})"
    return ""


def _look(folder: Path, names: dict[str, str]) -> str:
    """Wait for the files of all hosts."""
    end = time.monotonic() + PATIENCE_S
    while unseen := [host for host, name in names.items() if not (folder / name).exists()]:
        if time.monotonic() > end:
            return f"what {', '.join(unseen)} wrote there is not to be seen on {socket.gethostname()}"
        time.sleep(0.1)
    return ""
