"""Images on a file system that goes away for a while: wait for it instead of calling every image unreadable."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from clusterssl.data.decode import BadImageError
from clusterssl.errors import DataGone

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_S = 600.0
_LONGEST_PAUSE_S = 30.0
_OUT_OF_REACH = {
    getattr(errno, name, -1)
    for name in ("ESTALE", "EIO", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETUNREACH", "EREMOTEIO")
}
"""what network file systems answer while their server does not"""


def load_patiently(load: Callable[[], T], folder: str, patience_s: float) -> T:
    """What `load` returns; while its file system is out of reach it is tried again, at longer and longer intervals.

    Args:
        load: reads one image or file.
        folder: that is there when the images are; empty where there is no such folder.
        patience_s: seconds to go on trying.

    Raises:
        BadImageError: the image itself cannot be read.
        DataGone: the images did not come back in time.
    """
    pause, began = 0.5, time.monotonic()
    while True:
        try:
            return load()
        except BadImageError as error:
            if not _out_of_reach(error.__cause__, folder):
                raise
            waited = time.monotonic() - began
            if waited >= patience_s:
                raise DataGone(
                    f"the images in {folder} have been out of reach for {waited:.0f} s ({error}); "
                    "the same command goes on from the checkpoint when they are back"
                ) from error
            logger.warning("the images in %s are out of reach (%s): trying again in %.3g s", folder, error, pause)
        time.sleep(min(pause, max(patience_s - waited, 0.0)))
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _out_of_reach(cause: BaseException | None, folder: str) -> bool:
    return isinstance(cause, OSError) and (cause.errno in _OUT_OF_REACH or bool(folder and not Path(folder).is_dir()))
