"""What TensorBoard's event files hold, read without TensorBoard, whose own reader takes minutes for a long run."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

_TIME, _STEP = 0x09, 0x10
"""keys of an event's first two fields, a double and a number of variable length"""
_HEAD = 64
"""bytes of an event within which its name is found"""


def times_written(folder: Path, names: Sequence[str]) -> dict[tuple[str, int], list[float]]:
    """When scalars of these names were written, in seconds since 1970, by name and step (from 1 on).

    Args:
        folder: of event files; those that a kill has cut short are read as far as they go.
        names: none of which is a part of another.
    """
    found: dict[tuple[str, int], list[float]] = {}
    for path in folder.glob("events.out.tfevents.*"):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):  # length, its checksum, the event, its checksum
            (length,) = struct.unpack_from("<Q", data, at)
            event, at = data[at + 12 : at + 12 + length], at + 16 + length
            name = next((name for name in names if name.encode() in event[:_HEAD]), "")
            if name and len(event) == length and event[0] == _TIME and event[9] == _STEP:
                (written,) = struct.unpack_from("<d", event, 1)
                found.setdefault((name, _number(event, 10)), []).append(written)
    return found


def _number(data: bytes, at: int) -> int:
    value = shift = 0
    while data[at] & 0x80:
        value, shift, at = value | (data[at] & 0x7F) << shift, shift + 7, at + 1
    return value | data[at] << shift
