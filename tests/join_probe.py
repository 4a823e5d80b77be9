"""Joins the other ranks, adds up their numbers, and prints what it found as one line of JSON.

Variables: PROBE_SECONDS to wait for the others, PROBE_SOURCE of the package, PROBE_AFTER=READY:GO files to make and to
wait for before joining, PROBE_DIES=1 to end as soon as all ranks have answered the roll.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, os.environ.get("PROBE_SOURCE") or str(Path(__file__).resolve().parents[1] / "src"))

import torch

from clusterssl import config as cfg
from clusterssl import dist, joining
from clusterssl.log import log_to_screen


def main() -> None:
    if "PROBE_AFTER" in os.environ:
        ready, go = (Path(name) for name in os.environ["PROBE_AFTER"].split(":"))
        ready.touch()
        while not go.exists():
            time.sleep(0.05)
    if "PROBE_DIES" in os.environ:
        torch.distributed.init_process_group = lambda *place, **more: os._exit(0)
    world = joining.join(device="cpu", join_timeout_s=float(os.environ.get("PROBE_SECONDS", "50")))
    log_to_screen(world)
    total = dist.all_reduce_(torch.tensor(float(world.rank + 1)))
    found = {"rank": world.rank, "size": world.size, "local": world.local_rank, "launcher": world.launcher}
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    print(json.dumps({**found, "sum": float(total), "host": socket.gethostname(), "gpus": gpus}), flush=True)
    dist.barrier()
    dist.leave()


if __name__ == "__main__":
    cfg.entry(main)
