"""Which run a directory holds, and each start of it: run.json and launches.jsonl, read and written by rank 0."""

from __future__ import annotations

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.files import atomic_write, make_folder
from clusterssl.metrics_file import ends_within_line
from clusterssl.saving import CURRENT

_SILENT = """
    workers cache data_patience_minutes max_bad_fraction auto_batch dump_path checkpoint_freq checkpoint_minutes
    checkpoint_every log_freq stop_on_collapse tensorboard wandb report hang_minutes profile dist_url timeout_minutes
    join_timeout_seconds world_size rank local_rank
"""
SILENT = frozenset(_SILENT.split())
"""flags that change no result: a start may have others than the first, and nothing is said of it"""


class First(NamedTuple):
    """What run.json says of the first start."""

    method: str
    about: dict[str, Any]
    """flags and facts"""


class Starts:
    """The starts of the run in one directory, and this one once it is recorded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._about, self._launches = folder / "run.json", folder / "launches.jsonl"
        self._id = ""

    def first(self) -> First:
        """The first start.

        Raises:
            UserError: run.json is none of ours.
        """
        try:
            before = json.loads(self._about.read_text())
            return First(before["method"], {**before["config"], **before["facts"]})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._about}: damaged or of another program; choose another --dump_path") from error

    def compare(self, method: str, new: dict[str, Any], fixed: frozenset[str]) -> dict[str, str]:
        """What differs from the first start, if there was one, in words by name.

        Args:
            method: name of the method.
            new: flags and facts of this start.
            fixed: names of those that must not differ.

        Raises:
            UserError: the directory holds a run of another method, one of these differs, or it is no run of ours.
        """
        if not self._about.exists():
            if (self.folder / CURRENT).exists():
                raise UserError(
                    f"--dump_path {self.folder}: holds a {CURRENT} but no run.json, so it is not a run of ours; "
                    "choose another folder, or start from its weights with --init"
                )
            return {}
        known, old = self.first()
        if known != method:
            raise UserError(f"--dump_path {self.folder}: holds a run of {known}, not {method}; choose another folder")
        differing = [key for key in new if key in old and old[key] != new[key]]
        refused = [key for key in differing if key in fixed]
        if refused:
            difference = ", ".join(f"{key} was {old[key]} and is now {new[key]}" for key in refused)
            raise UserError(
                f"--dump_path {self.folder}: holds another run ({difference}); give what it was, or another folder"
            )
        return {key: f"--{key} differs from the first start: was {old[key]}, is now {new[key]}" for key in differing}

    def record(
        self, world: World, method: str, config: dict[str, Any], facts: dict[str, Any], *, anew: bool
    ) -> None:  # fmt: skip
        """Write this start down, as the first one if `anew` or if there was none; remove what a kill interrupted.

        Raises:
            OSError: the directory cannot be written.
        """
        make_folder(self.folder)
        for pattern in (".*.tmp", "checkpoints/.*.tmp", ".nonce-*"):
            for leftover in self.folder.glob(pattern):
                leftover.unlink(missing_ok=True)
        self._id = uuid.uuid4().hex
        start = {"id": self._id, **_circumstances(world)}
        if anew or not self._about.exists():
            record = {"method": method, "config": config, "facts": facts, "argv": sys.argv, **start}
            text = json.dumps(record, indent=1) + "\n"
            atomic_write(self._about, lambda file: file.write(text.encode()))
        torn = "\n" if ends_within_line(self._launches) else ""
        with self._launches.open("a") as file:
            file.write(torn + json.dumps(start) + "\n")

    def require_last(self) -> None:
        """Raise UserError where a later start of this run was recorded."""
        if self._id and json.loads(self._launches.read_text().splitlines()[-1]).get("id") != self._id:
            raise UserError(f"{self.folder}: another start of this run has taken over; this one ends")


def _circumstances(world: World) -> dict[str, Any]:
    """When, where and by which code this process was started."""
    device = world.device
    return {
        "time": time.time(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "host": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "world_size": world.size,
        "launcher": world.launcher,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "git": _git(),
    }


def _git() -> dict[str, Any] | None:
    """Commit of the code that runs and whether it was changed since; None outside a checkout."""
    here = Path(__file__).parent
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"sha": sha.stdout.strip(), "dirty": bool(dirty.stdout.strip())}
