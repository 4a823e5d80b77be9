"""Small pictures inside the page: strips of thumbnails as data addresses."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Gallery:
    """Labelled strips of thumbnails: (caption, text for those who do not see it, data address of a PNG)."""

    title: str
    strips: tuple[tuple[str, str, str], ...]
    note: str = ""


def strip(images: Sequence[np.ndarray], side: int = 32, gap: int = 2) -> str:
    """A row of images as the data address of one PNG.

    Args:
        images: uint8 arrays H x W x 3 (or H x W, grey), at least one.
        side: height and width of a thumbnail in pixels.
        gap: transparent pixels between two.
    """
    row = Image.new("RGBA", (len(images) * (side + gap) - gap, side), (0, 0, 0, 0))
    for at, image in enumerate(images):
        row.paste(Image.fromarray(image).convert("RGB").resize((side, side)), (at * (side + gap), 0))
    file = io.BytesIO()
    row.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
