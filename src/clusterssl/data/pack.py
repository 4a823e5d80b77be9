"""Packs a folder of images into a few large tar files, which `--data_path` takes in its place.

    python -m clusterssl.data.pack /imagenet /fast/imagenet
    python -m clusterssl.data.pack /imagenet /fast/imagenet256 --short_side 256 --quality 90

A folder that holds several of train/, val/ and test/ is packed split by split. Without --short_side files are copied
byte by byte: training on either gives the same crops. Killed, the same command goes on with the next shard; on packed
images it compares every shard and the index with their hashes and writes anew what is missing or damaged. See
`packed.py` for what is written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from clusterssl import config as cfg
from clusterssl import pulse
from clusterssl.data.crew import done_by
from clusterssl.data.listing import Listing, list_file, list_folder
from clusterssl.data.packed import INDEX, RECORD, is_packed, read_index, read_record, shard_name
from clusterssl.data.shards import fault, note_of, note_places, write_shard
from clusterssl.errors import Stopped, UserError
from clusterssl.files import atomic_write, first_line
from clusterssl.log import counted
from clusterssl.preemption import STOP_SIGNALS, StopRequest

logger = logging.getLogger(__name__)

_VERSION = 1
_USAGE = "python -m clusterssl.data.pack SRC DST [--flags]"


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
    """Pack a folder or list of images, or verify and mend what was packed before.

    Raises:
        UserError: no images, a file that cannot be read, other images or options than a pack begun here has, or a
            damaged record.
        Stopped: what `pulse.poll` raised; whole shards stay.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise UserError(f"{target}: lies inside the images to pack; name another folder")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file; name a folder for the packed images")
    for split in _splits(source, options.splits):
        if source.is_dir() and is_packed(source / split):
            raise UserError(f"{source / split}: is packed already; give it as --data_path, or name the original images")
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
        record = read_record(folder)
        _compare(about, record, folder)
        if _verified(folder, about, record):
            return
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.glob(".*.tmp"):
        torn.unlink()
    missing = [number for number in range(count) if not _is_done(folder, number, about)]
    images, shards = counted(len(listing.labels), "image"), counted(count, "shard")
    logger.info("%s: %s, %d of %s to write", folder, images, len(missing), shards)
    workers = options.workers or min(os.cpu_count() or 1, 8)
    for number in done_by(workers, partial(write_shard, listing, folder, about), missing):
        logger.info("%s written", folder / shard_name(number))
    _finish(listing, folder, about, count)


def _finish(listing: Listing, folder: Path, about: dict[str, Any], count: int) -> None:
    """Write the index and, last, the record."""
    notes = [json.loads(note_of(folder, number).read_text(encoding="utf-8")) for number in range(count)]
    offset, size = np.concatenate([np.array(note["places"], dtype=np.int64) for note in notes]).T
    shard = np.repeat(np.arange(count, dtype=np.int32), [len(note["places"]) for note in notes])
    arrays = {
        "labels": listing.labels, "shard": shard, "offset": offset, "size": size,
        "names": np.frombuffer(listing.names.blob, dtype=np.uint8)[: listing.names.ends[len(listing.labels) - 1]],
        "name_ends": listing.names.ends[: len(listing.labels)],
    }  # fmt: skip
    atomic_write(folder / INDEX, lambda file: np.savez(file, **arrays))
    shards = {shard_name(number): note["sha256"] for number, note in enumerate(notes)}
    record = {**about, "index_sha256": _index_hash(arrays), "shards": shards}
    atomic_write(folder / RECORD, lambda file: file.write(json.dumps(record, indent=1).encode() + b"\n"))
    for number in range(count):
        note_of(folder, number).unlink()
    logger.info("%s: %s in %s", folder, counted(about["images"], "image"), counted(count, "shard"))


def _verified(folder: Path, about: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether a finished pack is as it was written; if not, it is unfinished again but for its whole shards."""
    wrong = {name: fault(folder / name, digest) for name, digest in record["shards"].items()}
    try:
        whole_index = _index_hash(read_index(folder)) == record.get("index_sha256")
    except UserError:
        whole_index = False
    images, shards = counted(about["images"], "image"), counted(len(wrong), "shard")
    if whole_index and not any(wrong.values()):
        logger.info("%s: %s in %s, all as written", folder, images, shards)
        return True
    if not whole_index:
        logger.warning("%s: missing or damaged, is written anew", folder / INDEX)
    for number, (name, digest) in enumerate(record["shards"].items()):
        if wrong[name]:
            logger.warning("%s: %s, is written anew", folder / name, wrong[name])
        else:
            note_places(folder, about, number, digest)
    (folder / RECORD).unlink()
    return False


def _index_hash(arrays: dict[str, Any]) -> str:
    """Of the contents: a file of arrays holds its time, too."""
    return hashlib.sha256(b"".join(name.encode() + arrays[name].tobytes() for name in sorted(arrays))).hexdigest()


def _hash(listing: Listing) -> str:
    return hashlib.sha256(b"\n".join(os.fsencode(listing.names[i]) for i in range(len(listing.labels)))).hexdigest()


def _is_done(folder: Path, number: int, about: dict[str, Any]) -> bool:
    """Whether a shard was written before, whole and of the same images."""
    try:
        note = json.loads(note_of(folder, number).read_text(encoding="utf-8"))
        before, digest = note["about"], note["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    _compare(about, before, folder)
    wrong = fault(folder / shard_name(number), digest)
    if wrong:
        logger.warning("%s: %s, is written anew", folder / shard_name(number), wrong)
    return not wrong


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
    helped = any(word in ("-h", "--help") for word in words)
    cfg.require(len(paths) == 2 or helped, f"put the two folders first: {_USAGE}")
    options = cfg.parse(PackOptions, words[len(paths) :], description=__doc__, usage=_USAGE)
    reencoded = options.short_side > 0 or not cfg.gives(words, "quality")
    cfg.require(reencoded, "--quality: files stay as they are without --short_side; give --short_side 256, say, too")
    with StopRequest(STOP_SIGNALS) as request, pulse.polled(lambda: _end_if_asked(request)):
        pack(paths[0], paths[1], options)


def _end_if_asked(request: StopRequest) -> None:
    if request.received:
        raise Stopped(f"stopped by {request.received}; whole shards stay, the same command goes on with the next")


if __name__ == "__main__":
    cfg.entry(main)
