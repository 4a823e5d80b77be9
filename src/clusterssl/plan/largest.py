"""The largest batch that fits, as rehearsals tell: python -m clusterssl.plan.largest FACTS SCRIPT FLAGS."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from clusterssl import config as cfg
from clusterssl.auto_batch import largest, scaled
from clusterssl.plan.blueprint import Blueprint, read_script
from clusterssl.plan.network import Network
from clusterssl.plan.rehearsal import rehearse
from clusterssl.plan.summary import RESIDENT, Job, Plan


def needed(blueprint: Blueprint, images: int, nodes: int, per_node: int, *, gpu: bool) -> int:
    """Bytes that one rank takes at its worst moment beside what a process has anyway; on a CPU with what it loads."""
    rehearsed = rehearse(blueprint, images, nodes * per_node, gpu=gpu)
    plan = Plan(blueprint, Job(nodes, per_node, gpu, Network(100.0, 20.0)), rehearsed)
    host = sum(nbytes for name, nbytes in plan.host_bytes.items() if name != RESIDENT)
    return plan.device_bytes if gpu else plan.device_bytes + host


def main() -> None:
    facts = json.loads(sys.argv[1])
    nodes, per_node, gpu = facts["nodes"], facts["per_node"], facts["gpu"]
    blueprint = read_script(Path(sys.argv[2]), sys.argv[3:], nodes, per_node)

    def bytes_of(batch: int) -> int:
        config = scaled(blueprint.config, batch, nodes * per_node)
        return needed(replace(blueprint, config=config), facts["images"], nodes, per_node, gpu=gpu)

    sys.stdout.write(f"\nbatch {largest(bytes_of, facts['limit'], facts['most'])}\n")


if __name__ == "__main__":
    cfg.entry(main)
