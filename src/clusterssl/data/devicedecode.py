"""Decoding on the training device (--decode gpu): workers read files, the main process decodes, crops, resizes there.

Suffixes: B rows of a batch, V views.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clusterssl.data.dataset import Batch, Key, load_or_neighbour, shared_bytes
from clusterssl.data.decode import BadImageError, decode, jpeg_frame, pixel_count
from clusterssl.data.devicecrops import Pixels, device_crops
from clusterssl.data.multicrop import MultiCrop
from clusterssl.data.source import Source
from clusterssl.errors import UserError

logger = logging.getLogger(__name__)

Decoder = Callable[[list[Tensor]], list[Tensor]]
"""JPEG files, uint8 [n] on the CPU, to images uint8 [3, H, W] on one device; RuntimeError where it cannot read one"""

_PIXELS_AT_ONCE = 2**26
_AREA_UNKNOWN = 2**20
"""pixels that the neighbour of an unreadable image is taken to have"""
_END_OF_IMAGE = b"\xff\xd9"
_TAIL_BYTES = 64
"""where a JPEG's end marker may lie, as some writers pad their files"""
_PROBES = 8
_DEVICE_ERRORS = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
"""those that say nothing about an image; older torch knows the second as a RuntimeError only"""


class Raw(NamedTuple):
    """Files of a batch behind one another."""

    buffer: Tensor
    """uint8"""
    ends: NDArray[np.int64]
    keys: NDArray[np.int64]
    """[B, 2] epoch, dataset position"""
    areas: NDArray[np.int64]
    """[B] pixels, by the header; 0: unreadable"""
    suits: NDArray[np.bool_]
    """[B] whether a decoder of JPEGs may read it"""

    def file(self, row: int) -> Tensor:
        """Bytes of one file; none if it could not be read."""
        return self.buffer[int(self.ends[row - 1]) if row else 0 : int(self.ends[row])]


class RawDataset(Dataset[Raw]):
    """Files of images, for the workers; asked with keys (epoch, dataset position)."""

    def __init__(self, source: Source) -> None:
        """Raises UserError: these images are in no files, or kept decoded."""
        if not hasattr(source, "read"):
            raise UserError("--decode gpu: these images are built in or kept decoded, not JPEG files; leave it out")
        self.source: Any = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: Sequence[Key]) -> Raw:
        """The files of these images."""
        files = [self._read(i) for _, i in keys]
        ends = np.cumsum([len(file) for file in files])
        buffer = shared_bytes(int(ends[-1]))
        np.concatenate(files, out=buffer.numpy())
        areas, suits = np.array([pixel_count(file) for file in files]), np.array([_suits(file) for file in files])
        return Raw(buffer, ends, np.asarray(keys, dtype=np.int64), areas, suits & (areas > 0))

    def _read(self, i: int) -> NDArray[np.uint8]:
        try:
            return self.source.read(i)
        except BadImageError:  # its neighbour is found by whoever decodes
            return np.empty(0, dtype=np.uint8)


def _suits(file: NDArray[np.uint8]) -> bool:
    """Whether it is a whole JPEG, grey or of three colours; of a truncated one a GPU's decoder may make a picture."""
    _, _, components, bits = jpeg_frame(file) or (0, 0, 0, 0)
    return components in (1, 3) and bits == 8 and _END_OF_IMAGE in file[-_TAIL_BYTES:].tobytes()


@dataclass
class DeviceDecode:
    """What makes batches of files."""

    source: Source
    decoder: Decoder
    device: torch.device
    fallbacks: int = field(default=0, init=False)
    """images that the decoder did not read"""

    def __post_init__(self) -> None:
        """Warns where the images seem to be no JPEGs."""
        if not hasattr(self.source, "read"):
            return
        looked_at = np.unique(np.linspace(0, len(self.source) - 1, _PROBES).astype(np.int64)).tolist()
        if not RawDataset(self.source).__getitems__([(0, i) for i in looked_at]).suits.any():
            logger.warning(
                "--decode gpu: none of %d images looked at is a JPEG that a GPU decodes, first %s; the main process "
                "decodes them one by one: leave --decode out",
                len(looked_at), self.source.name(0),
            )  # fmt: skip

    def batch(self, raw: Raw, multicrop: MultiCrop, seed: int) -> Batch:
        """What `MultiCropDataset` makes of the same keys, its crops on the device."""
        epoch_B, index_B = raw.keys.T
        u_BVS = multicrop.uniforms(seed, epoch_B, index_B)
        parts, bad = [], []
        for rows in _portions(raw.areas):
            images, met = self._images(raw, rows)
            pixels = Pixels.of(images)
            boxes_BV4 = multicrop.boxes(u_BVS[rows], pixels.height_N, pixels.width_N)
            own = np.arange(len(images))
            parts.append(device_crops(pixels, own, boxes_BV4, multicrop.sizes, multicrop.interpolation))
            bad += met
        crops = parts[0] if len(parts) == 1 else [torch.cat(views) for views in zip(*parts, strict=True)]
        return Batch.of(crops, multicrop.params(u_BVS), index_B, bad)

    def _images(self, raw: Raw, rows: slice) -> tuple[list[Tensor], list[tuple[int, str]]]:
        """Images of some rows on the device, and unreadable ones met."""
        places = range(len(raw.keys))[rows]
        wanted = [row for row in places if raw.suits[row]]
        decoded = dict(zip(wanted, self._decoded([raw.file(row) for row in wanted]), strict=True))
        images: list[Tensor] = []
        bad: list[tuple[int, str]] = []
        for row in places:
            image = decoded.get(row)
            if image is None:
                image, met = self._otherwise(raw.file(row), int(raw.keys[row, 1]))
                bad += met
            images.append(image.to(self.device, non_blocking=True))
        return images, bad

    def _decoded(self, files: list[Tensor]) -> list[Tensor | None]:
        """What the decoder reads; None where it refuses."""
        if not files:
            return []
        try:
            return list(self.decoder(files))
        except RuntimeError as error:  # it does not say which one
            if isinstance(error, _DEVICE_ERRORS) or "CUDA error" in str(error):
                raise
        half = len(files) // 2
        return self._decoded(files[:half]) + self._decoded(files[half:]) if half else [None]

    def _otherwise(self, file: Tensor, i: int) -> tuple[Tensor, list[tuple[int, str]]]:
        self.fallbacks += 1
        if self.fallbacks == 1:
            logger.info(
                "--decode gpu: what the GPU's decoder refuses is decoded by the CPU, first %s", self.source.name(i)
            )
        try:
            return decode(file.numpy()), []
        except BadImageError:
            return load_or_neighbour(self.source, i)


def _portions(areas_B: NDArray[np.int64]) -> Iterator[slice]:
    """Rows that together have not too many pixels."""
    first, total = 0, 0
    for row, area in enumerate(np.where(areas_B > 0, areas_B, _AREA_UNKNOWN).tolist()):
        if total + area > _PIXELS_AT_ONCE and row > first:
            yield slice(first, row)
            first, total = row, 0
        total += area
    yield slice(first, len(areas_B))


def gpu_decoder(device: torch.device) -> Decoder:
    """torchvision's nvJPEG on a GPU.

    Raises:
        UserError: the device is none, or this torchvision has no nvJPEG.
    """
    if device.type != "cuda":
        raise UserError(f"--decode gpu: needs a CUDA GPU, and this run is on {device}; leave --decode out")
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        def decoder(files: list[Tensor]) -> list[Tensor]:
            return decode_jpeg(files, mode=ImageReadMode.RGB, device=device)

        picture = io.BytesIO()
        Image.new("RGB", (8, 8)).save(picture, "JPEG")
        decoder([torch.frombuffer(bytearray(picture.getvalue()), dtype=torch.uint8)])
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--decode gpu: this torchvision cannot ({reason}); leave --decode out") from error
    return decoder
