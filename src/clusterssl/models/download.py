"""Fetch a file once into torch's hub cache: locked, complete or absent, never half."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch

from clusterssl.errors import UserError

logger = logging.getLogger(__name__)

PUBLISHED = "https://dl.fbaipublicfiles.com/deepcluster"
_TIMEOUT_S = 30.0
_CHUNK = 1 << 20


def is_url(path_or_url: str) -> bool:
    """Whether the argument is an address rather than a path."""
    return "://" in path_or_url


def cache_path(url: str) -> Path:
    """Where the file of `url` is kept: torch.hub.get_dir()/checkpoints, under torch's own name for the published files.

    Others get a prefix of their address's hash: checkpoint.pth.tar is a name of several published files already.
    """
    name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name or "download"
    if url != f"{PUBLISHED}/{name}":
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}_{name}"
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def fetch(url: str) -> tuple[Path, bool]:
    """Local copy of the file at `url`.

    Returns:
        Path in the cache, and whether it was downloaded just now.

    Raises:
        UserError: the address cannot be read, sends less than it promises, or the cache cannot be written.
    """
    path = cache_path(url)
    if path.is_file():
        return path, False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            if path.is_file():
                return path, False
            _download(url, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space there or set TORCH_HOME to another folder"
        ) from error
    return path, True


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process of this machine download at a time; the lock ends with the process that holds it."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system: at worst the file is downloaded twice
        yield
        return
    with path.with_name(path.name + ".lock").open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(url: str, path: Path) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            _copy(url, file, path)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _copy(url: str, file: IO[bytes], path: Path) -> None:
    """Stream the body of `url` into `file`; the exceptions of the network become one line."""
    with _network_errors(url):
        response = urllib.request.urlopen(url, timeout=_TIMEOUT_S)
    with response:
        expected = int(response.headers.get("Content-Length") or -1)
        logger.info("downloading %s (%.0f MB) to %s", url, max(expected, 0) / 1e6, path)
        received = 0
        with torch.hub.tqdm(
            total=max(expected, 0) or None, unit="B", unit_scale=True, disable=not sys.stderr.isatty()
        ) as bar:
            while True:
                with _network_errors(url):
                    chunk = response.read(_CHUNK)
                if not chunk:
                    break
                file.write(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    if received < expected:
        raise UserError(f"cannot download {url}: {received} of {expected} bytes came; {_REMEDY}")


_REMEDY = "try again, or download it by hand and give the path of the file instead (torch.hub: weights=PATH)"


@contextlib.contextmanager
def _network_errors(url: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        code = f"HTTP {error.code} " if hasattr(error, "code") else ""
        raise UserError(f"cannot download {url}: {code}{reason}; {_REMEDY}") from error
