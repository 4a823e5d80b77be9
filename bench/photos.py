"""Real photographs for benches: those of a folder, or unpacked from the sample archive."""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clusterssl.errors import UserError

ARCHIVE = "imagenet-sample.tar"


@contextmanager
def folder_of_photos(data_path: str) -> Iterator[str]:
    """A folder of photographs: `data_path`, or for "" a temporary one with those of ARCHIVE in $CLUSTERSSL_DATA.

    Raises:
        UserError: neither is there.
    """
    if data_path:
        yield data_path
        return
    archive = Path(os.environ.get("CLUSTERSSL_DATA", "")) / ARCHIVE
    if not archive.is_file():
        raise UserError(f"no photographs: name a folder with --data_path, or that of {ARCHIVE} with CLUSTERSSL_DATA")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        yield f"{folder}/train"
