"""Starting the entry scripts as a user does: as processes, on one or several ranks."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

from tests.forked import Script

ROOT = Path(__file__).resolve().parent.parent

TINY = [
    *("--data_path", "synthetic:96:24x24", "--nmb_crops", "2", "1", "--size_crops", "16", "12"),
    *("--min_scale_crops", "0.4", "0.2", "--max_scale_crops", "1", "0.5", "--arch", "conv4w4", "--hidden_mlp", "16"),
    *("--feat_dim", "8", "--nmb_prototypes", "12", "--base_lr", "0.5", "--warmup_epochs", "1", "--epochs", "4"),
    *("--freeze_prototypes_niters", "3", "--workers", "0", "--log_freq", "1", "--device", "cpu"),
    *("--report", "false"),
]
"""flags of a run of seconds: 96 images, 3 crops of two sizes"""


class Launched:
    """One run of a script on some ranks."""

    def __init__(self, script: str, *args: str, ranks: int = 1, env: dict[str, str] | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        if script.startswith("main_") and "--report" not in args:
            args = (*args, "--report", "false")  # the page takes seconds, its own tests are enough
        self.processes = []
        for rank in range(ranks):
            place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
            place |= {"MASTER_ADDR": "127.0.0.1"}
            together = {**os.environ, "OMP_NUM_THREADS": "1", **(place if ranks > 1 else {}), **(env or {})}
            self.processes.append(Script([str(ROOT / script), *args], together))

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to one rank or to all that still run."""
        for position, process in enumerate(self.processes):
            if rank in (None, position) and process.poll() is None:
                process.send_signal(number)

    def wait(self, timeout: float = 240) -> tuple[list[int], str]:
        """Exit codes, and everything that was printed."""
        printed = ""
        for process in self.processes:
            out, err = process.communicate(timeout=timeout)
            printed += out + err
        return [process.returncode for process in self.processes], printed


def wait_for_step(folder: Path, step: int, launched: Launched, timeout: float = 240) -> None:
    """Return as soon as metrics.jsonl shows this step, or the run has ended."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and launched.processes[0].poll() is None:
        if any(record.get("step", -1) >= step for record in metrics(folder)):
            return
        time.sleep(0.01)


def metrics(folder: Path) -> list[dict]:
    """Whole records of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n") if path.exists() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # the last line while it is being written
            continue
    return records
