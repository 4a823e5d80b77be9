"""One shard of packed images: written, hashed, compared with its hash."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from clusterssl import pulse
from clusterssl.data.decode import BadImageError, decode, jpeg_frame
from clusterssl.data.listing import Listing
from clusterssl.data.packed import shard_name
from clusterssl.errors import UserError
from clusterssl.files import atomic_write

logger = logging.getLogger(__name__)

_SUFFIXES = {"jpeg": "jpg", "tif": "tiff"}


def write_shard(listing: Listing, folder: Path, about: dict[str, Any], number: int) -> int:
    """Write shard `number`, compare what arrived on the disk with what was written, and note where its files lie."""
    path = folder / shard_name(number)
    first = number * about["shard_images"]
    places: list[tuple[int, int]] = []
    hashed = _Hashed()

    def write(file: IO[bytes]) -> None:
        hashed.file = file
        with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
            for i in range(first, min(first + about["shard_images"], about["images"])):
                pulse.poll()
                data, suffix = _content(listing.names[i], about)
                _add(tar, f"{i:09d}.{suffix}", data)
                places.append((tar.offset - _padded(len(data)), len(data)))
                if listing.labels[i] >= 0:
                    _add(tar, f"{i:09d}.cls", b"%d" % listing.labels[i])

    atomic_write(path, write)
    digest = hashed.digest.hexdigest()
    wrong = fault(path, digest)
    if wrong:
        raise UserError(f"{path}: {wrong} as soon as it was written, the disk may be failing; pack into another folder")
    _note(folder, about, number, digest, places)
    return number


class _Hashed:
    """A file to be written once, front to back, and its hash."""

    def __init__(self) -> None:
        self.file: IO[bytes] | None = None
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        assert self.file is not None
        self.digest.update(data)
        return self.file.write(data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # without time and owner: the same images give the same shard
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _content(path: str, about: dict[str, Any]) -> tuple[bytes, str]:
    """What is packed of a file, and the suffix of its name."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be packed ({error.strerror}); repair or remove it, run again") from error
    suffix = Path(path).suffix[1:].lower()
    suffix = _SUFFIXES.get(suffix, suffix)
    if not about["short_side"]:
        return data, suffix
    try:
        smaller = _reduced(np.frombuffer(bytearray(data), dtype=np.uint8), about["short_side"], about["quality"])
    except BadImageError as error:
        logger.warning("%s: packed as it is (%s)", path, error)
        return data, suffix
    return (data, suffix) if smaller is None else (smaller, "jpg")


def _reduced(data: Any, short_side: int, quality: int) -> bytes | None:
    """A smaller JPEG of an image file; None where the file is one that is small enough already."""
    image = decode(data)
    height, width = image.shape[1:]
    scale = short_side / min(height, width)
    if scale >= 1 and jpeg_frame(data) is not None:
        return None
    if scale < 1:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        planar = image[None].contiguous(memory_format=torch.channels_last)
        image = F.interpolate(planar, size=size, mode="bilinear", antialias=True)[0]
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
    return file.getvalue()


def note_of(folder: Path, number: int) -> Path:
    return folder / f"{shard_name(number)}.json"


def fault(path: Path, digest: str) -> str:
    """What is wrong with a shard whose SHA-256 was `digest`; empty: nothing."""
    try:
        with path.open("rb") as file:
            found = hashlib.sha256()
            while block := file.read(2**20):
                pulse.poll()
                found.update(block)
    except OSError as error:
        return "missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    return "" if found.hexdigest() == digest else "damaged"


def note_places(folder: Path, about: dict[str, Any], number: int, digest: str) -> None:
    """Write anew the note of a whole shard."""
    with tarfile.open(folder / shard_name(number), "r:") as tar:
        places = [(member.offset_data, member.size) for member in tar if not member.name.endswith(".cls")]
    _note(folder, about, number, digest, places)


def _note(folder: Path, about: dict[str, Any], number: int, digest: str, places: list[tuple[int, int]]) -> None:
    note = {"about": about, "sha256": digest, "places": places}
    atomic_write(note_of(folder, number), lambda file: file.write(json.dumps(note).encode()))
