"""A sign of life from long passes over images."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from clusterssl import dist

logger = logging.getLogger(__name__)

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 10.0


def paced(items: Iterable[T], images: int, what: str, each: int = 1) -> Iterator[T]:
    """Pass items on; every ten seconds a line says how far and how fast.

    Args:
        items: of `each` images, the last one of fewer.
        images: how many there are.
        what: begins the line.
        each: images of an item.
    """
    start = shown = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - shown > SECONDS_BETWEEN_LINES:
            shown, done = now, min(number * each, images)
            share = f" of rank 0 of {dist.size()}" if dist.size() > 1 else ""
            logger.info("%s: %d of %d images%s, %.1f images/s", what, done, images, share, done / (now - start))
