"""Small pictures inside the page: strips of thumbnails as data addresses."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, features

_QUALITY = 70


class Strip(NamedTuple):
    """One picture of a gallery; readers choose clusters by their size and purity, where these are given."""

    caption: str
    words: str
    """for those who do not see it"""
    address: str
    """of the picture, as data"""
    images: int | None = None
    purity: float | None = None
    """between 0 and 1"""


@dataclass(frozen=True)
class Gallery:
    """Labelled strips of thumbnails: (caption, text for those who do not see it, data address of a picture)."""

    title: str
    strips: tuple[tuple[str, str, str] | Strip, ...]
    note: str = ""
    wide: bool = False
    """two strips beside one another instead of three"""
    run: Path | None = None
    """directory of the run it is of"""
    choice: bool = True
    """whether readers may choose among the strips"""
    largest: float | None = None
    """share of the run's images in its largest cluster"""


def largest_cluster(galleries: Sequence[Gallery], run: Path) -> float | None:
    """Share of a run's images in its largest cluster, where a gallery tells."""
    return next((found.largest for found in galleries if found.run == run and found.largest is not None), None)


def grid(rows: Sequence[Sequence[np.ndarray]], side: int = 128, border: int = 3, gap: int = 15) -> bytes:
    """Rows of images with black borders on white as a PNG file.

    Args:
        rows: uint8 arrays H x W x 3 (or H x W, grey); rows may differ in length, one image at least.
        side: height and width of an image in pixels.
        border: black pixels around each image.
        gap: white pixels between rows and around all.
    """
    cell = side + 2 * border
    width = max(len(row) for row in rows) * cell + 2 * gap
    sheet = Image.new("RGB", (width, len(rows) * (cell + gap) + gap), (255, 255, 255))
    for number, row in enumerate(rows):
        for at, image in enumerate(row):
            left, top = gap + at * cell, gap + number * (cell + gap)
            sheet.paste((0, 0, 0), (left, top, left + cell, top + cell))
            sheet.paste(_thumbnail(image, side), (left + border, top + border))
    return _png(sheet)


def strip(images: Sequence[np.ndarray], side: int = 32, gap: int = 2, *, photo: bool = False) -> str:
    """A row of images as the data address of one picture.

    Args:
        images: uint8 arrays H x W x 3 (or H x W, grey), at least one.
        side: height and width of a thumbnail in pixels.
        gap: transparent pixels between two.
        photo: a WebP that is not quite exact, a tenth as large as the PNG where the images are photographs.
    """
    row = Image.new("RGBA", (len(images) * (side + gap) - gap, side), (0, 0, 0, 0))
    for at, image in enumerate(images):
        row.paste(_thumbnail(image, side), (at * (side + gap), 0))
    return address_of(row, photo=photo)


def address_of(picture: Image.Image, *, photo: bool = False) -> str:
    """A picture as a data address; see `strip`."""
    if photo and features.check("webp"):
        file = io.BytesIO()
        picture.save(file, format="WEBP", quality=_QUALITY)
        return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return "data:image/png;base64," + base64.b64encode(_png(picture)).decode("ascii")


def _thumbnail(image: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(image).convert("RGB").resize((side, side))


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return file.getvalue()
