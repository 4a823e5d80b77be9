"""How the ranks of a run find one another and become one process group."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as torch_dist

from clusterssl import interfaces
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.files import first_line
from clusterssl.rendezvous import Place, find_place, nodes, open_store
from clusterssl.rollcall import Note, call_roll, describe

GROUP_S = 10.0
"""seconds at least to make the process group: all have answered the roll, who does not come now has died"""


def join(
    *, device: str = "auto", dist_url: str = "env://", timeout_s: float = 1800.0, join_timeout_s: float = 50.0
) -> World:
    """Find this process's place and join the others; a process alone joins nobody.

    Args:
        device: "auto" (the GPU of the local rank where there is one), "cpu" or "cuda".
        dist_url: "env://" (addresses from torchrun or Slurm) or an explicit "tcp://host:port".
        timeout_s: seconds after which a collective without answer is an error.
        join_timeout_s: seconds to wait for ranks that have not come.

    Raises:
        UserError: a GPU was asked for and there is none, ranks are missing, or they do not go together.
    """
    env = dict(os.environ)
    place = find_place(env)
    chosen = _device(device, place.local_rank)
    notes: tuple[Note, ...] = ()
    if place.size > 1 and not torch_dist.is_initialized():
        deadline = time.monotonic() + join_timeout_s
        try:
            notes = _meet(place, chosen, dist_url, env, timeout_s, deadline)
        except (RuntimeError, ValueError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"rank {place.rank} of {place.size} on {socket.gethostname()} could not join the others: "
                f"{first_line(error)}; check that all ranks started and can reach one another"
            ) from error
    return World(place.rank, place.size, place.local_rank, chosen, place.launcher, notes)


def require_gpu(flag: str, remedy: str) -> None:
    """Raise `UserError`, with the flag that asks for a GPU and what to do instead, unless one is visible."""
    if not torch.cuda.is_available():
        raise UserError(f"{flag}: no GPU is visible to this process; {remedy}")


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    require_gpu(f"--device {name}", "use --device cpu or auto")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _meet(
    place: Place, device: torch.device, dist_url: str, env: dict[str, str], timeout_s: float, deadline: float
) -> tuple[Note, ...]:
    """Find the others, check that all are there and fit, and make the process group."""
    meeting = open_store(place, dist_url, env, deadline)
    expected = nodes(env) if place.launcher == "srun" else []
    try:
        answer = call_roll(meeting, place, describe(place, device, meeting.host), expected, deadline)
    finally:
        meeting.close()
    if answer.elsewhere and "GLOO_SOCKET_IFNAME" not in env and interfaces.name_is_local():
        interface = interfaces.interface_of(interfaces.address_towards(answer.elsewhere))
        os.environ.update({"GLOO_SOCKET_IFNAME": interface} if interface else {})
    group_s = max(deadline - time.monotonic(), GROUP_S)
    meeting.store.set_timeout(timedelta(seconds=group_s))
    torch_dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=torch_dist.PrefixStore("group", meeting.store),
        rank=place.rank, world_size=place.size, timeout=timedelta(seconds=group_s),
    )  # fmt: skip
    set_timeout = getattr(torch_dist, "set_timeout", None) or torch_dist.distributed_c10d._set_pg_timeout
    set_timeout(timedelta(seconds=timeout_s))
    meeting.store.set_timeout(timedelta(seconds=timeout_s))
    return answer.notes
