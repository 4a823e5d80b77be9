"""Images packed into a few large tar files with an index: what `clusterssl.data.pack` writes.

File systems of clusters take as long to open a small file as a large one, and bear no millions of them. A packed folder
holds the samples of the folder it was made from, in its order, under its names.

    pack.json     what was packed and how, SHA-256 of every shard; written last, so its presence means complete
    index.npz     names, labels, and where each file lies
    000000.tar    000000000.jpg, 000000000.cls, ...: as webdataset names them; .cls holds the label's number, if known
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clusterssl.data.decode import BadImageError, decode
from clusterssl.data.listing import Names
from clusterssl.data.patience import PATIENCE_S, load_patiently
from clusterssl.errors import UserError

RECORD, INDEX = "pack.json", "index.npz"
AGAIN = "the same python -m clusterssl.data.pack again"
_ARRAYS = ("labels", "shard", "offset", "size", "names", "name_ends")
_OPEN_FILES = 128


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"{number:06d}.tar"


def is_packed(folder: Path) -> bool:
    """Whether a folder was packed, completely.

    Raises:
        UserError: packing it was begun and not finished.
    """
    if (folder / RECORD).is_file():
        return True
    if any(folder.glob("*.tar.json")) or all((folder / name).is_file() for name in (INDEX, shard_name(0))):
        raise UserError(f"{folder}: packing was not finished; run {AGAIN}")
    return False


def read_record(folder: Path) -> dict[str, Any]:
    """What was packed.

    Raises:
        UserError: unreadable, or not what was written.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); see to its folder") from error
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("shards"), dict) or "classes" not in record:
        raise UserError(f"{path}: damaged; remove it and run {AGAIN}, which writes all shards anew")
    return record


def read_index(folder: Path) -> dict[str, NDArray[Any]]:
    """Arrays of the index.

    Raises:
        UserError: missing or damaged.
    """
    path = folder / INDEX
    try:
        with np.load(path) as index:
            return {name: index[name] for name in _ARRAYS}
    except Exception as error:  # damage can show anywhere inside the reader, whose advice would be wrong
        wrong = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise UserError(f"{path}: {wrong}; run {AGAIN}, which writes it anew") from error


class PackedSource:
    """Images in shards."""

    def __init__(self, folder: Path, limit: int = -1, patience_s: float = PATIENCE_S) -> None:
        """Read the index.

        Args:
            folder: that `is_packed`.
            limit: keep the first `limit` images; negative: all.
            patience_s: seconds to wait for a file system that is out of reach.

        Raises:
            UserError: a damaged record or index, or a shard that is missing or truncated.
        """
        self.folder = folder
        record, arrays = read_record(folder), read_index(folder)
        self.classes: list[str] = record["classes"]
        kept = slice(None if limit < 0 else limit)
        self.labels: NDArray[np.int64] = arrays["labels"][kept]
        self._shard, self._offset, self._size = (arrays[name][kept] for name in ("shard", "offset", "size"))
        self._names = Names.of_bytes(str(folder), arrays["names"].tobytes(), arrays["name_ends"])
        self._require_sizes()
        self._patience_s = patience_s
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Path of image i as it was before packing, below this folder."""
        return self._names[i]

    def file_bytes(self, i: int) -> int:
        """Size of the file of image i."""
        return int(self._size[i])

    def load(self, i: int) -> Tensor:
        """Decodes image i; see `decode` and `load_patiently`."""
        return decode(self.read(i))

    def read(self, i: int) -> NDArray[np.uint8]:
        """Bytes of the file of image i, uint8 [n].

        Raises:
            UserError: its shard is missing, truncated or unreadable, which is no matter of one image.
        """
        try:
            return load_patiently(lambda: self._read(i), str(self.folder), self._patience_s)
        except BadImageError as error:
            raise self._damaged(int(self._shard[i]), str(error)) from error

    def _require_sizes(self) -> None:
        """Raise UserError for a shard that ends before its last image."""
        ends = np.zeros(int(self._shard.max(initial=-1)) + 1, dtype=np.int64)
        np.maximum.at(ends, self._shard, self._offset + self._size)
        for shard, end in enumerate(ends.tolist()):
            try:
                if (self.folder / shard_name(shard)).stat().st_size < end:
                    raise self._damaged(shard, "truncated")
            except FileNotFoundError:
                raise self._damaged(shard, "missing") from None
            except OSError:  # out of reach: reading waits for it
                return

    def _damaged(self, shard: int, wrong: str) -> UserError:
        return UserError(f"{self.folder / shard_name(shard)}: {wrong}; run {AGAIN}, which writes this shard anew")

    def _read(self, i: int) -> NDArray[np.uint8]:
        data = np.empty(int(self._size[i]), dtype=np.uint8)
        shard, count = int(self._shard[i]), 0
        try:
            while count < len(data):
                got = os.preadv(self._file(shard), [data.data[count:]], int(self._offset[i]) + count)
                count += got
                if not got:
                    break
        except OSError as error:
            self._close(shard)  # a file handle may be stale where the file is not
            raise BadImageError(f"cannot be read ({error.strerror or error})") from error
        if count != len(data):
            raise BadImageError("truncated")
        return data

    def _file(self, shard: int) -> int:
        """Descriptor of a shard; reads name their place, so that forked workers can share it."""
        if shard not in self._files:
            while len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self.folder / shard_name(shard), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._files.move_to_end(shard)
        return self._files[shard]

    def _close(self, shard: int) -> None:
        descriptor = self._files.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        for shard in list(getattr(self, "_files", ())):
            self._close(shard)
