"""Where the package's log lines go."""

from __future__ import annotations

import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

from clusterssl.dist import World


def log_to_screen(world: World) -> logging.Logger:
    """Rank 0 shows everything, other ranks only warnings, with their rank; returns the package's logger.

    What joining the ranks brought to light is shown at once.
    """
    package = _show(world)
    package.addHandler(MemoryHandler(1000, flushLevel=logging.CRITICAL + 1))
    for level, text in world.notes:
        package.log(level, "%s", text)
    return package


def _show(world: World) -> logging.Logger:
    package = logging.getLogger("clusterssl")
    for handler in list(package.handlers):
        package.removeHandler(handler)
    package.setLevel(logging.INFO if world.is_main else logging.WARNING)
    package.propagate = False
    screen = logging.StreamHandler(sys.stdout)
    screen.setFormatter(logging.Formatter("%(message)s" if world.is_main else f"rank {world.rank}: %(message)s"))
    screen.addFilter(lambda record: not getattr(record, "file_only", False))
    package.addHandler(screen)
    return package


def log_to_file(path: Path, world: World) -> None:
    """As `log_to_screen`, and rank 0 also appends everything to a file, with what the screen has shown before."""
    handlers = logging.getLogger("clusterssl").handlers
    early = [record for one in handlers if isinstance(one, MemoryHandler) for record in one.buffer]
    package = _show(world)
    if world.is_main:
        file = logging.FileHandler(path)
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        package.addHandler(file)
        for record in early:
            file.handle(record)


def counted(number: int, thing: str) -> str:
    """`1 group`, `2 groups`."""
    return f"{number} {thing}" + "s" * (number != 1)
