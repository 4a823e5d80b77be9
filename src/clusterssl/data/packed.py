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
    if any(folder.glob("*.tar.json")):
        raise UserError(f"{folder}: packing was not finished; run the same python -m clusterssl.data.pack again")
    return False


class PackedSource:
    """Images in shards."""

    def __init__(self, folder: Path, limit: int = -1, patience_s: float = PATIENCE_S) -> None:
        """Read the index.

        Args:
            folder: that `is_packed`.
            limit: keep the first `limit` images; negative: all.
            patience_s: seconds to wait for a file system that is out of reach.

        Raises:
            UserError: unreadable index, or of another version.
        """
        self.folder = folder
        try:
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            with np.load(folder / INDEX) as index:
                arrays = {name: index[name] for name in index.files}
            self.classes: list[str] = record["classes"]
            kept = slice(None if limit < 0 else limit)
            self.labels: NDArray[np.int64] = arrays["labels"][kept]
            self._shard, self._offset, self._size = (arrays[name][kept] for name in ("shard", "offset", "size"))
            self._names = Names.of_bytes(str(folder), arrays["names"].tobytes(), arrays["name_ends"])
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder}: the index of the packed images cannot be read ({error}); pack again") from error
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
        """Bytes of the file of image i, uint8 [n]."""
        return load_patiently(lambda: self._read(i), str(self.folder), self._patience_s)

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
            raise BadImageError(f"{shard_name(shard)} cannot be read: {error.strerror or error}") from error
        if count != len(data):
            raise BadImageError(f"{shard_name(shard)} is truncated")
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
