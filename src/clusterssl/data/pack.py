"""Packs a folder of images into a few large tar files, which `--data_path` takes in its place.

    python -m clusterssl.data.pack /imagenet /fast/imagenet
    python -m clusterssl.data.pack /imagenet /fast/imagenet256 --short_side 256 --quality 90

A folder that holds several of train/, val/ and test/ is packed split by split. Without --short_side files are copied
byte by byte: training on either gives the same crops. Killed, the same command goes on with the next shard; on packed
images it compares every shard with its hash. See `packed.py` for what is written.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from clusterssl import config as cfg
from clusterssl.data.decode import BadImageError, decode, jpeg_frame
from clusterssl.data.listing import Listing, list_file, list_folder
from clusterssl.data.packed import INDEX, RECORD, shard_name
from clusterssl.errors import UserError
from clusterssl.files import atomic_write, first_line

logger = logging.getLogger(__name__)

_VERSION = 1
_SUFFIXES = {"jpeg": "jpg", "tif": "tiff"}


@dataclass(frozen=True)
class PackOptions:
    """Packing."""

    short_side: int = 0
    """shorter side in pixels to which larger images are reduced, encoded again as JPEG; 0: files stay as they are"""
    quality: int = 90
    """of JPEGs encoded again, 1 to 100"""
    shard_images: int = 4096
    """images of a shard"""
    workers: int = 0
    """processes; 0: as many as there are cores, 8 at most"""

    splits: tuple[str, ...] = ()
    """subfolders to pack each by itself; without: all, where train/ and val/ or test/ are among them"""

    def __post_init__(self) -> None:
        cfg.require_numbers(self, "short_side", "workers", least=0)
        cfg.require_numbers(self, "quality", least=1, most=100)
        cfg.require_numbers(self, "shard_images", least=1)


def pack(source: str | Path, target: str | Path, options: PackOptions = PackOptions()) -> None:
    """Pack a folder or list of images, or verify what was packed before.

    Raises:
        UserError: no images, a file that cannot be read, other images or options than a pack begun here has, or a shard
            that does not match its hash.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise UserError(f"{target}: lies inside the images to pack; name another folder")
    for split in _splits(source, options.splits):
        listing = list_file(source) if source.is_file() else list_folder(source / split)
        try:
            _pack_split(listing, target / split, options)
        except OSError as error:
            raise UserError(f"{target / split}: cannot be written ({first_line(error)}); choose another") from error


def _splits(source: Path, wanted: tuple[str, ...]) -> list[str]:
    """Subfolders that are packed each by itself: all of a folder that is split as `open_source` understands it."""
    absent = [name for name in wanted if not (source / name).is_dir()]
    if absent:
        raise UserError(f"--splits {' '.join(wanted)}: {source} has no folder {absent[0]}/")
    if wanted or not (source / "train").is_dir():
        return list(wanted or [""])
    if not any((source / name).is_dir() for name in ("val", "test")):
        raise UserError(
            f"{source}: holds train/ but neither val/ nor test/; name its splits, --splits train validation, or give "
            f"{source / 'train'} alone"
        )
    return sorted(folder.name for folder in source.iterdir() if folder.is_dir())


def _pack_split(listing: Listing, folder: Path, options: PackOptions) -> None:
    count = -(-len(listing.labels) // options.shard_images)
    about = {
        "version": _VERSION, "images": len(listing.labels), "classes": listing.classes, "names_sha256": _hash(listing),
        "short_side": options.short_side, "quality": options.quality if options.short_side else None,
        "shard_images": options.shard_images,
    }  # fmt: skip
    if (folder / RECORD).is_file():
        _compare(about, json.loads((folder / RECORD).read_text(encoding="utf-8")), folder)
        verify(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.glob(".*.tmp"):
        torn.unlink()
    missing = [number for number in range(count) if not _is_done(folder, number, about)]
    logger.info("%s: %d images, %d of %d shards to write", folder, len(listing.labels), len(missing), count)
    for number in _written(missing, partial(write_shard, listing, folder, about), options.workers):
        logger.info("%s written", folder / shard_name(number))
    _finish(listing, folder, about, count)


def _written(numbers: list[int], write: Any, workers: int) -> Iterator[int]:
    """Numbers of the shards, each when it is written."""
    workers = min(workers or min(os.cpu_count() or 1, 8), len(numbers))
    if workers <= 1:
        yield from map(write, numbers)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(write, numbers)


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
                data, suffix = _content(listing.names[i], about)
                _add(tar, f"{i:09d}.{suffix}", data)
                places.append((tar.offset - _padded(len(data)), len(data)))
                if listing.labels[i] >= 0:
                    _add(tar, f"{i:09d}.cls", b"%d" % listing.labels[i])

    atomic_write(path, write)
    digest = hashed.digest.hexdigest()
    _check(path, digest)
    note = {"about": about, "sha256": digest, "places": places}
    atomic_write(_note(folder, number), lambda file: file.write(json.dumps(note).encode()))
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


def _finish(listing: Listing, folder: Path, about: dict[str, Any], count: int) -> None:
    """Write the index and, last, the record."""
    notes = [json.loads(_note(folder, number).read_text(encoding="utf-8")) for number in range(count)]
    offset, size = np.concatenate([np.array(note["places"], dtype=np.int64) for note in notes]).T
    shard = np.repeat(np.arange(count, dtype=np.int32), [len(note["places"]) for note in notes])
    arrays = {
        "labels": listing.labels, "shard": shard, "offset": offset, "size": size,
        "names": np.frombuffer(listing.names.blob, dtype=np.uint8)[: listing.names.ends[len(listing.labels) - 1]],
        "name_ends": listing.names.ends[: len(listing.labels)],
    }  # fmt: skip
    atomic_write(folder / INDEX, lambda file: np.savez(file, **arrays))
    record = {**about, "shards": {shard_name(number): note["sha256"] for number, note in enumerate(notes)}}
    atomic_write(folder / RECORD, lambda file: file.write(json.dumps(record, indent=1).encode() + b"\n"))
    for number in range(count):
        _note(folder, number).unlink()
    logger.info("%s: %d images in %d shards", folder, about["images"], count)


def verify(folder: Path) -> None:
    """Compare every shard with its hash.

    Raises:
        UserError: one is missing or has changed.
    """
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    for name, digest in record["shards"].items():
        _check(folder / name, digest)
    logger.info("%s: %d images in %d shards, all as written", folder, record["images"], len(record["shards"]))


def _check(path: Path, digest: str) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.sha256()
            while block := file.read(2**20):
                found.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); pack into another folder") from error
    if found.hexdigest() != digest:
        raise UserError(f"{path}: differs from what was written; remove {path.parent / RECORD} and it, and pack again")


def _hash(listing: Listing) -> str:
    return hashlib.sha256(b"\n".join(os.fsencode(listing.names[i]) for i in range(len(listing.labels)))).hexdigest()


def _note(folder: Path, number: int) -> Path:
    return folder / f"{shard_name(number)}.json"


def _is_done(folder: Path, number: int, about: dict[str, Any]) -> bool:
    """Whether a shard was written before, whole and of the same images."""
    path = _note(folder, number)
    if not path.is_file():
        return False
    note = json.loads(path.read_text(encoding="utf-8"))
    _compare(about, note["about"], folder)
    _check(folder / shard_name(number), note["sha256"])
    return True


def _compare(about: dict[str, Any], before: dict[str, Any], folder: Path) -> None:
    for key, value in about.items():
        if before.get(key) != value:
            other = key in ("images", "classes", "names_sha256")
            told = "other images" if other else f"{key} was {before.get(key)}, is {value}"
            raise UserError(f"{folder}: holds a pack of other images or options ({told}); choose another folder")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = sys.argv[1:]
    paths = words[: next((i for i, word in enumerate(words) if word.startswith("-")), len(words))]
    options = cfg.parse(PackOptions, words[len(paths) :], description=__doc__)
    cfg.require(len(paths) == 2, "name two folders: python -m clusterssl.data.pack SRC DST")
    pack(paths[0], paths[1], options)


if __name__ == "__main__":
    cfg.entry(main)
