"""Files of a test cluster: slurm.conf with short waits, fake GPUs, host names, and a stand-in for accounting."""

from __future__ import annotations

import getpass
import os
import socket
from dataclasses import dataclass
from pathlib import Path

CONTROLLER = "controller"

SETTINGS = """
ClusterName=test
SlurmctldHost={host}({controller})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MailProg=/bin/true
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
LaunchParameters=use_interactive_step
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
"""
"""cred_expire=5 lets a requeued job start again after 6 seconds instead of 121; less than 5 is ignored.
preempt_send_user_signal sends the job's --signal as soon as it is to be preempted."""

SACCT = """#!/bin/sh
# Accounting needs a database; this answers what is asked for with -j from the queue, which remembers ended jobs.
jobs=""
while [ $# -gt 0 ]; do
    case "$1" in
        -j) jobs="$jobs,$2"; shift ;;
        -j*) jobs="$jobs,${1#-j}" ;;
    esac
    shift
done
echo "JobID|State|NodeList"
squeue --noheader --states=all --jobs="${jobs#,}" --format="%i|%T|%N"
"""


@dataclass(frozen=True)
class Shape:
    """What a cluster looks like."""

    nodes: int = 2
    name: str = "node{}"
    """of a node, by its number from 1; "gpu{:03}" pads with zeros"""
    gpus: int = 8
    cpus: int = 256
    memory: int = 512_000
    features: str = ""
    partitions: tuple[str, ...] = ("main",)
    """the first is the default; a partition "urgent", whose jobs preempt those of others, comes with them"""
    ipv6: bool = False
    """nodes have no IPv4 address but that of their loopback"""

    def names(self) -> list[str]:
        """Names of the nodes."""
        return [self.name.format(number) for number in range(1, self.nodes + 1)]

    def address(self, subnet: int, number: int) -> str:
        """Address of a node, or of the controller's host (number 0)."""
        return f"fd00:213:{subnet:x}::{number + 1:x}" if self.ipv6 else f"10.213.{subnet}.{number + 1}"


def write_settings(folder: Path, shape: Shape, subnet: int) -> None:
    """Write everything the daemons read below `folder`."""
    for name in ("munge", "state", "log", "run", "spool", "bin", "dev"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    (folder / "munge").chmod(0o755)
    for gpu in range(shape.gpus):
        (folder / "dev" / f"gpu{gpu}").symlink_to("/dev/null")  # has to be a character device
    devices = f"Name=gpu File={folder}/dev/gpu[0-{shape.gpus - 1}]\n" if shape.gpus else ""
    (folder / "gres.conf").write_text(devices)
    (folder / "hosts").write_text(_hosts(shape, subnet))
    (folder / "slurm.conf").write_text(_configuration(folder, shape, subnet))
    sacct = folder / "bin" / "sacct"
    sacct.write_text(SACCT)
    sacct.chmod(0o755)


def _hosts(shape: Shape, subnet: int) -> str:
    loopback = "::1 localhost" if shape.ipv6 else "127.0.0.1 localhost"
    names = [CONTROLLER, *shape.names()]
    return "\n".join([loopback, *(f"{shape.address(subnet, n)} {name}" for n, name in enumerate(names))]) + "\n"


def _configuration(folder: Path, shape: Shape, subnet: int) -> str:
    lines = [
        SETTINGS.format(
            folder=folder, host=socket.gethostname().split(".")[0], controller=shape.address(subnet, 0),
            port=20000 + subnet, user=getpass.getuser(),
        )
    ]  # fmt: skip
    if shape.ipv6:
        lines.append("CommunicationParameters=EnableIPv6,DisableIPv4")
    features = f" Feature={shape.features}" if shape.features else ""
    gpus = f" Gres=gpu:{shape.gpus}" if shape.gpus else ""
    for number, name in enumerate(shape.names(), start=1):
        lines.append(
            f"NodeName={name} NodeAddr={shape.address(subnet, number)} Port=6818 CPUs={shape.cpus} "
            f"RealMemory={shape.memory}{gpus}{features}"
        )
    common = "Nodes=ALL DefaultTime=60 MaxTime=INFINITE"
    for number, name in enumerate(shape.partitions):
        default = "NO" if number else "YES"
        lines.append(f"PartitionName={name} {common} Default={default} PriorityTier=1 GraceTime=10")
    lines.append(f"PartitionName=urgent {common} PriorityTier=10 PreemptMode=OFF")
    return "\n".join(lines) + "\n"
