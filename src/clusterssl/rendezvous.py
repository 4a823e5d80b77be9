"""How the processes of a run find one another: their places, the host and port they meet at, the store they share.

A rank in search of the others never talks to a store before it has asked, over a socket of its own, whether the store
belongs to this run: a port may be taken by another program, or by another run, and stores wait for ever for an answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlparse

import torch.distributed as torch_dist

from clusterssl.errors import UserError
from clusterssl.files import first_line

CANDIDATES = 8
"""ports that are tried, one after another, where the first is taken"""
PATIENCE_S = 2.0
"""seconds for an answer from a host that accepted a connection"""


@dataclass(frozen=True)
class Place:
    """Number of this process among all, and how it got it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str = "alone"


def find_place(env: dict[str, str]) -> Place:
    """Read the place from torchrun's variables first, then Slurm's, then assume a process alone.

    torchrun comes first because inside a Slurm job its workers see the agent's Slurm variables. Slurm's count only
    inside a step that `srun` started: a batch script or an salloc shell has the job's variables but is no rank.

    Raises:
        UserError: the variables contradict each other or are no numbers.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        names, launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "torchrun"
    elif "SLURM_PROCID" in env and _in_step(env):
        size = "SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
        names, launcher = ("SLURM_PROCID", size, "SLURM_LOCALID"), "srun"
    else:
        return Place()
    values = [env.get(name, default) for name, default in zip(names, ("0", "1", "0"), strict=True)]
    said = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    if not all(value.isdigit() for value in values):
        raise UserError(f"{said}: not whole numbers; unset them, or start with torchrun or srun")
    rank, size_, local_rank = map(int, values)
    if rank >= size_:
        raise UserError(f"{said}: ranks are numbered from 0 to {size_ - 1}; start with torchrun or srun")
    return Place(rank, size_, local_rank, launcher)


def _in_step(env: dict[str, str]) -> bool:
    """Whether this is a task of srun; Slurm gives the shells of salloc and batch scripts numbers near 2^32."""
    return env.get("SLURM_STEP_ID", "").isdigit() and int(env["SLURM_STEP_ID"]) < 0xFFFFFF00


def expand(hosts: str) -> list[str]:
    """Host names of Slurm's short form: "a[08-10,12],b" are a08, a09, a10, a12 and b."""
    found: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hosts):
        pieces = re.split(r"\[([^\]]*)\]", part)
        choices = [_numbers(piece) if odd % 2 else [piece] for odd, piece in enumerate(pieces)]
        found += ["".join(choice) for choice in itertools.product(*choices)]
    return found


def _numbers(ranges: str) -> Iterable[str]:
    """Numbers of "08-10,12" with their leading zeros."""
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        yield from (f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1))


def ranks_per_node(env: dict[str, str]) -> int:
    """Processes of this run on each node, by torchrun's or Slurm's variables; 1 alone.

    Raises:
        UserError: the nodes have different numbers of them.
    """
    launcher = find_place(env).launcher
    if launcher == "torchrun":
        return int(env.get("LOCAL_WORLD_SIZE", "1"))
    if launcher == "alone":
        return 1
    counts = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "1")  # such as 6(x11)
    if "," in counts:
        raise UserError(f"SLURM_TASKS_PER_NODE={counts}: nodes differ; give the images per rank with --batch_size")
    return int(counts.partition("(")[0])


def nodes(env: dict[str, str]) -> list[str]:
    """Hosts of this Slurm step in the order of their ranks; empty outside Slurm."""
    return expand(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST", ""))


def meeting_point(place: Place, dist_url: str, env: dict[str, str]) -> tuple[str, int] | None:
    """Host of rank 0 and the first port to try; None where torch's own rendezvous has to do (torchrun's agent, files).

    The port of a Slurm step depends on job, step and restart, so that what is left of another one is not in the way.

    Raises:
        UserError: nothing says where rank 0 is.
    """
    if dist_url.startswith("tcp://"):
        url = urlparse(dist_url)
        if not url.hostname or not url.port:
            raise UserError(f"--dist_url {dist_url}: give it as tcp://host:port, or env://")
        return url.hostname, url.port
    if dist_url != "env://" or env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    if env.get("MASTER_ADDR"):
        port = env.get("MASTER_PORT", "29500")
        if not port.isdigit() or not 0 < int(port) < 65536:
            raise UserError(f"MASTER_PORT={port}: not a port number; give one between 1024 and 65535")
        return env["MASTER_ADDR"], int(port)
    if place.launcher == "srun" and nodes(env):
        job, step, restart = (
            int(env.get(key) or "0") for key in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        )
        return nodes(env)[0], 10000 + (job + 37 * step + 7919 * restart) % 20000
    raise UserError("MASTER_ADDR is not set; set it to the host of rank 0, or start with torchrun or srun")


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of a run met."""

    store: torch_dist.Store
    where: str
    host: str = "localhost"
    """of rank 0, or of torchrun's agent"""
    greeter: socket.socket | None = None

    def close(self) -> None:
        """Stop telling ranks where the store is; the store itself stays."""
        if self.greeter is not None:
            with contextlib.suppress(OSError):
                self.greeter.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for callers
            self.greeter.close()


def open_store(place: Place, dist_url: str, env: dict[str, str], deadline: float) -> Meeting:
    """Open the store that all ranks of this run reach.

    Args:
        place: of this process.
        dist_url: "env://", "tcp://host:port", or what torch.distributed understands.
        env: this process's variables.
        deadline: in time.monotonic().

    Raises:
        UserError: rank 0 cannot be found, with all that was tried.
    """
    point = meeting_point(place, dist_url, env)
    patience = timedelta(seconds=max(deadline - time.monotonic(), 1))
    if point is None:
        store, *_ = next(torch_dist.rendezvous(dist_url, place.rank, place.size, timeout=patience))
        # torchrun's agent keeps its store when it starts all ranks again; what the last start left there is no news.
        store = torch_dist.PrefixStore(f"start{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        agent = f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')} (torchrun's agent)"
        return Meeting(store, agent, env.get("MASTER_ADDR", "")) if dist_url == "env://" else Meeting(store, dist_url)
    host, first = point
    ports = range(first, min(first + CANDIDATES, 65536))
    if place.rank == 0:
        return _receive(host, ports, token(place, env), patience)
    port, number = _find(place, host, ports, token(place, env), deadline)
    store = torch_dist.TCPStore(host, number, wait_for_workers=False, timeout=patience)
    return Meeting(store, f"{host}:{port}", host)


def _receive(host: str, ports: Iterable[int], word: str, patience: timedelta) -> Meeting:
    """Open the store in this process and begin to tell the others where it is."""
    listening = _bind([0])
    number = listening.getsockname()[1]
    store = torch_dist.TCPStore(
        "localhost", number, is_master=True, wait_for_workers=False, timeout=patience,
        master_listen_fd=listening.detach(),
    )  # fmt: skip
    greeter = _bind(ports)
    threading.Thread(target=_greet, args=(greeter, word, number), daemon=True).start()
    return Meeting(store, f"{host}:{greeter.getsockname()[1]}", host, greeter)


def token(place: Place, env: dict[str, str]) -> str:
    """What only the ranks of one start of one run have in common."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "SUBMITIT_LOCAL_JOB_ID", "TORCHELASTIC_RUN_ID")
    said = [Path(sys.argv[0]).name, str(place.size), place.launcher, *(env.get(name, "") for name in names)]
    return hashlib.sha256("\0".join(said).encode()).hexdigest()[:32]


def _bind(ports: Iterable[int]) -> socket.socket:
    """A socket that listens on the first free of these ports, on all addresses of both kinds."""
    both = socket.has_dualstack_ipv6()
    for port in ports:
        try:
            if both:
                return socket.create_server(("", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
            return socket.create_server(("", port), backlog=4096)
        except OSError as error:
            problem = first_line(error)
    tried = list(ports)
    raise UserError(
        f"rank 0 found no free port on {socket.gethostname()} from {tried[0]} to {tried[-1]} ({problem}); "
        "set MASTER_PORT to another one in all ranks"
    )


def _greet(greeter: socket.socket, word: str, number: int) -> None:
    """Tell everybody who knows the word at which port the store is, until the socket is closed."""
    while True:
        try:
            caller, _ = greeter.accept()
        except OSError:
            return
        threading.Thread(target=_answer, args=(caller, word, number), daemon=True).start()


def _answer(caller: socket.socket, word: str, number: int) -> None:
    with caller, contextlib.suppress(OSError):
        caller.settimeout(PATIENCE_S)
        heard = caller.recv(64).decode(errors="replace").strip()
        caller.sendall((f"{number}\n" if heard == word else "another run\n").encode())


def _find(place: Place, host: str, ports: Iterable[int], word: str, deadline: float) -> tuple[int, int]:
    """The port at which rank 0 of this run answers, and that of its store."""
    tried: dict[int, str] = {}
    while time.monotonic() < deadline:
        for port in ports:
            tried[port] = _ask(host, port, word, min(PATIENCE_S, deadline - time.monotonic()))
            if tried[port].isdigit():
                return port, int(tried[port])
            if time.monotonic() > deadline:
                break
        time.sleep(0.2)
    answers = "; ".join(f"{why} at {_span(at)}" for why, at in _grouped(tried))
    raise UserError(
        f"rank {place.rank} of {place.size} on {socket.gethostname()} cannot join, rank 0 is missing: tried {host} "
        f"({answers or 'no time was left'}); check that rank 0 started there and can be reached from here"
    )


def _ask(host: str, port: int, word: str, patience_s: float) -> str:
    """The number of the store's port as rank 0 says it, or why there is none."""
    try:
        with socket.create_connection((host, port), timeout=max(patience_s, 0.1)) as caller:
            caller.sendall(f"{word}\n".encode())
            heard = caller.recv(64).decode(errors="replace").strip()
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return heard if heard.isdigit() or heard == "another run" else "another program"


def _grouped(tried: dict[int, str]) -> Iterable[tuple[str, list[int]]]:
    for why in dict.fromkeys(tried.values()):
        yield why, [port for port, said in tried.items() if said == why]


def _span(ports: list[int]) -> str:
    return f"ports {ports[0]} to {ports[-1]}" if len(ports) > 1 else f"port {ports[0]}"
