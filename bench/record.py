"""What all benches share: their flags, and a measurement written with what a reader needs to trust or repeat it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch
from summary import Summary

from clusterssl import config as cfg
from clusterssl.errors import UserError
from clusterssl.joining import require_gpu

C = TypeVar("C")

PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "timm", "lightly", "faiss-cpu", "kornia", "albumentations")
MAY_BE_ZERO = ("workers", "k", "seed", "seeds", "latency_us", "local_latency_us", "memory_rows")
"""flags whose 0 means something though their default is another"""


def options_of(cls: type[C], description: str | None) -> C:
    """Flags of a bench that can be measured here: see `flags_of`; its GPU is there, its result can be written.

    Raises:
        UserError: see `flags_of`; there is no GPU; the result cannot be written.
    """
    options = flags_of(cls, description)
    if getattr(options, "device", "") == "cuda":
        require_gpu("--device cuda", "use --device cpu")
    if out := getattr(options, "out", ""):
        check_out(Path(out))
    return options


def check_out(path: Path, flag: str = "--out") -> None:
    """Try whether the file of a result can be written, before it is measured.

    Raises:
        UserError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open("ab"):
                return
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror}); choose another") from error


def flags_of(cls: type[C], description: str | None) -> C:
    """Flags of a bench, of which none is a nonsense size: a number whose default is positive must be, too.

    Raises:
        UserError: see `config.parse`; a number that is too small.
    """
    options = cfg.parse(cls, description=description or "")
    for usual, given in zip(cfg.flags(cls()), cfg.flags(options), strict=True):
        zero = given.name in MAY_BE_ZERO or usual.default in (0, ())
        for value in given.default if isinstance(given.default, tuple) else (given.default,):
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                fits = value > 0 or (zero and value == 0)
                cfg.require(fits, f"--{given.name} {value:g}: must be above 0" + " or 0" * zero)
    return options


def write_result(path: Path, result: dict[str, Any], summary: Callable[[dict[str, Any]], Summary]) -> None:
    """Write `result` beside hardware, versions, commit and command, and print what `summary` makes of it."""
    root = Path(__file__).resolve().parent.parent
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = [
        subprocess.run(["git", *words], cwd=root, capture_output=True, text=True).stdout.strip()
        for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno", "--", ".", ":!bench/results", ":!*.md"))
    ]
    about = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "commit": git[0],
        "changed_since": bool(git[1]),
        "hardware": hardware(),
        "versions": versions,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "result": result}, indent=1)
    path.write_text(text + "\n")
    print(f"\n{summary(json.loads(text)['result'])}\n\nwritten to {path}", flush=True)


def hardware() -> dict[str, Any]:
    """Processor, cores, and GPU if there is one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model, "cores": os.cpu_count(), "gpu": gpu}
