"""Writing files that are whole or absent, and reading checkpoints that cannot run code."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from clusterssl.errors import UserError


def atomic_write(path: Path, write: Callable[[IO[bytes]], Any], *, keep_previous_as: Path | None = None) -> None:
    """Write a file so that a crash, a kill or a full disk leaves the old one or the new one, never a torn one.

    Args:
        path: final name.
        write: called with a binary file object opened beside `path`.
        keep_previous_as: where the file that `path` held before stays available (hard link or copy).

    Raises:
        UserError: the disk is full or not writable; `path` is as it was before.
    """

    def fill(aside: Path) -> None:
        with aside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())

    _put(path, fill, keep_previous_as)


def atomic_link(source: Path, path: Path, *, keep_previous_as: Path | None = None) -> None:
    """As `atomic_write`: make `path` another name of the file at `source`; a copy where there are no hard links."""

    def fill(aside: Path) -> None:
        aside.unlink(missing_ok=True)
        os.link(source, aside)

    try:
        _put(path, fill, keep_previous_as)
    except UserError:
        atomic_write(path, lambda file: file.write(source.read_bytes()), keep_previous_as=keep_previous_as)


def _put(path: Path, fill: Callable[[Path], None], previous: Path | None) -> None:
    """Let `fill` make a file beside `path` and move it there."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fill(aside)
        if previous is not None and path.exists():
            _keep(path, previous)
        aside.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a failed write as RuntimeError
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise UserError(
            f"{path}: could not be written ({first_line(error)}); what was there before is intact, free some space"
        ) from error


def _keep(path: Path, previous: Path) -> None:
    """Make `previous` another name of the file at `path`; a hard link, so that no byte is copied."""
    link = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # file systems without hard links: move, the new file follows at once
        path.replace(previous)
        return
    link.replace(previous)


def make_folder(folder: Path) -> None:
    """Make a folder that outlives a power cut, unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Make new names durable; some file systems refuse to sync a folder, and then nothing more can be done."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_checkpoint(state: dict[str, Any], path: Path, *, keep_previous_as: Path | None = None) -> None:
    """`torch.save` through `atomic_write`. The state holds tensors and plain Python values only."""
    atomic_write(path, lambda file: torch.save(state, file), keep_previous_as=keep_previous_as)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file onto the CPU without ever running code from it (`weights_only=True`, or safetensors).

    Args:
        path: the file; or a folder, such as a run directory, with one of the usual name.

    Raises:
        UserError: no such file; truncated or foreign file; a file that holds pickled objects.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        inside = next((path / name for name in _USUAL if (path / name).is_file()), None)
        if inside is None:
            raise UserError(f"{path}: a folder without {' or '.join(_USUAL)}; give the checkpoint file")
        path = inside
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file; check the path")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if _is_text(path):
        raise UserError(f"{path}: a text file, not a checkpoint; give the file of the weights")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on old or foreign pickle protocols help nobody
            with torch.serialization.safe_globals([_Queue]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, {_why_refused(error)}") from error
    except Exception as error:  # a damaged file can fail anywhere inside the reader
        packed = _packed(path)
        if packed:
            raise UserError(f"{path}: an archive of {packed}; unpack it and give one of these files") from error
        why = f"truncated or of another kind ({first_line(error)})"
        raise UserError(f"{path}: not a readable checkpoint, {why}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint dictionary")
    return state


def _is_text(path: Path) -> bool:
    """Whether a file begins with words; some of them would be read as instructions of a pickle."""
    with path.open("rb") as file:
        begin = file.read(256)
    return bool(begin) and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in begin)


def read_whole(path: Path) -> dict[str, Any]:
    """As `read_checkpoint`, of a file whose checksums match.

    Raises:
        UserError: as `read_checkpoint` and `check_sums`.
    """
    if path.is_file():
        check_sums(path)
    return read_checkpoint(path)


def check_sums(path: Path) -> None:
    """Compare a checkpoint's bytes with the checksums that were written with them; PyTorch's own reader does not.

    Raises:
        UserError: a byte has changed, or the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()
    except Exception as error:  # damage can show anywhere inside the reader
        raise UserError(f"{path}: not a readable checkpoint, truncated or damaged ({first_line(error)})") from error
    if torn:
        raise UserError(f"{path}: damaged, {torn} does not match its checksum")


_USUAL = ("checkpoint.pth.tar", "model.safetensors")


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Tensors under "state_dict", and under "model" what the file says of its network."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError(f"{path}: needs safetensors; run pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # the library's error is none of Python's
        raise UserError(f"{path}: not a readable safetensors file ({first_line(error)})") from error
    told: dict[str, Any] = {key: about[key] for key in ("arch", "stem") if key in about}
    if re.fullmatch(r"\d+x\d+", about.get("image_size", "")):
        told["size_crops"] = [[int(side) for side in about["image_size"].split("x")]]
    return {"state_dict": tensors, "model": told}


def _packed(path: Path) -> str:
    """Names of the first files in a zip archive that is none of torch's, "" for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
    except (OSError, zipfile.BadZipFile):
        return ""
    ours = any(name.endswith(("/data.pkl", "/version")) for name in names)
    return "" if ours else ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


class _Queue:
    """Takes the place of the class whose instance Self-Classifier's files hold beside the weights; runs nothing."""


_Queue.__module__, _Queue.__qualname__, _Queue.__name__ = "utils", "NNQueue", "NNQueue"  # torch 2.6 looks at the last


def _why_refused(error: Exception) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))
    if found:
        return f"it wants to run code on loading ({found.group(1)}); re-save its weights as a plain dict of tensors"
    return "it is damaged or not a file of PyTorch weights"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for messages of one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
