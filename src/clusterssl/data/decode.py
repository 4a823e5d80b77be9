"""From the bytes of an image file to an RGB tensor, whatever the file holds; or a reason why not.

JPEGs go through torchvision (libjpeg-turbo without PIL's copies), everything else and everything it refuses through
PIL. Sizes are read from the header before a single pixel is decoded. The EXIF orientation is ignored, as in the
published systems and in every loader derived from torchvision's ImageFolder.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision is giving its decoders up; PIL reads the same pixels, a little slower
    decode_jpeg = None

MAX_PIXELS = 89_478_485
"""Larger images are refused: the size from which on PIL warns of a decompression bomb (ImageNet's largest has 61 M)."""
MAX_FILE_BYTES = 512 * 2**20

_SIZED_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended and progressive Huffman frames
_BARE_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length


class BadImageError(Exception):
    """The file is no readable image; the message is the reason."""


def decode_file(path: str | os.PathLike[str]) -> Tensor:
    """Reads and decodes one file.

    Returns:
        uint8 [3, H, W] RGB, usually strided channels-last.

    Raises:
        BadImageError: missing, empty, truncated, too large, or no image.
    """
    return decode(read_file(path))


def read_file(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Bytes of an image file, uint8 [n]. Raises BadImageError: missing, or too large."""
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise BadImageError(f"file of {size:,} bytes; at most {MAX_FILE_BYTES:,} are read")
            return np.fromfile(file, dtype=np.uint8)
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror or error}") from error


def decode(data: NDArray[np.uint8]) -> Tensor:
    """Decodes the bytes of an image file, uint8 [n]; see `decode_file`."""
    if len(data) == 0:
        raise BadImageError("empty file")
    frame = jpeg_frame(data)
    if frame is not None:
        height, width, components, precision = frame
        _check_size(height, width)
        if decode_jpeg is not None and components in (1, 3) and precision == 8 and min(height, width) > 0:
            try:
                return decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB)
            except RuntimeError:
                pass  # PIL has the last word: it reads some files that torchvision refuses
    return _decode_with_pil(data)


def jpeg_frame(data: NDArray[np.uint8]) -> tuple[int, int, int, int] | None:
    """(height, width, components, bits) from a JPEG's frame header; None if it is no JPEG of a common kind."""
    view = memoryview(data.data)
    end = len(view)
    if end < 4 or view[0] != 0xFF or view[1] != 0xD8:
        return None
    at = 2
    while at + 9 < end:
        if view[at] != 0xFF:
            return None
        marker = view[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _SIZED_FRAMES:
            height, width = view[at + 5] << 8 | view[at + 6], view[at + 7] << 8 | view[at + 8]
            return height, width, view[at + 9], view[at + 4]
        elif marker in _BARE_MARKERS:
            at += 2
        else:
            at += 2 + (view[at + 2] << 8 | view[at + 3])
    return None


def pixel_count(data: NDArray[np.uint8]) -> int:
    """Pixels that the header of an image file, of any format, announces; 0: none, or more than are decoded."""
    height, width = (jpeg_frame(data) or (0, 0))[:2]
    if height * width == 0:
        with contextlib.suppress(Exception), warnings.catch_warnings():  # as in _decode_with_pil
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data.tobytes())) as image:
                height, width = image.height, image.width
    return height * width if height * width <= MAX_PIXELS else 0


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BadImageError(f"{width} x {height} pixels; at most {MAX_PIXELS:,} pixels are decoded")


def _decode_with_pil(data: NDArray[np.uint8]) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data.tobytes())) as image:
                _check_size(image.height, image.width)
                pixels = _rgb(image)
    except BadImageError:
        raise
    except Exception as error:  # PIL's plugins raise nearly everything on broken files
        reason = " ".join(str(error).split()) or "unreadable"
        if "cannot identify image file" in reason:
            reason = "not an image"
        raise BadImageError(f"{reason} ({type(error).__name__})") from error
    if pixels.size == 0:
        raise BadImageError("image without pixels")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Any mode -> uint8 [H, W, 3]; 16-bit grey keeps its high byte, alpha is dropped."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.array(image)
        if image.mode == "F":
            grey = grey * (255.0 if np.nanmax(grey) <= 1.0 else 1.0)
        elif image.mode != "I" or grey.max() > 255:
            grey = grey >> 8
        return np.repeat(np.nan_to_num(grey).clip(0, 255).astype(np.uint8)[..., None], 3, axis=-1)
    return np.array(image.convert("RGB"))
