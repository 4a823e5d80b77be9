"""Who is here: each rank reports what it is and runs, rank 0 says who is missing and what does not go together."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from clusterssl.errors import UserError
from clusterssl.interfaces import address_towards, is_loopback
from clusterssl.rendezvous import Meeting, Place

PACKAGES = (
    "torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow", "timm", "faiss-cpu", "faiss-gpu", "submitit",
)  # fmt: skip
CLOCK_S = 2.0
"""seconds by which clocks may differ before that is remarked"""

Record = dict[str, Any]
Note = tuple[int, str]
"""level of logging and text"""


@dataclass(frozen=True)
class Answer:
    """What the roll call brought to light."""

    notes: tuple[Note, ...] = ()
    """worth logging, in rank 0"""
    elsewhere: str = ""
    """address of a node other than rank 0's; empty if there is none"""


def describe(place: Place, device: torch.device, host: str) -> Record:
    """What this rank reports: its host and address towards rank 0's, device, versions, and a hash of its code."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "rank": place.rank, "host": socket.gethostname(), "pid": os.getpid(), "device": str(device),
        "address": address_towards(host),
        "gpu": gpu.name if gpu else "", "uuid": str(getattr(gpu, "uuid", "")), "versions": versions, "code": code(),
    }  # fmt: skip


def code() -> str:
    """Hash of the package's sources and of the script that runs."""
    package = Path(__file__).parent
    script = Path(sys.argv[0])
    digest = hashlib.sha256()
    for path in [*sorted(package.rglob("*.py")), *([script] if script.suffix == ".py" and script.is_file() else [])]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:10]


def call_roll(meeting: Meeting, place: Place, record: Record, expected: Sequence[str], deadline: float) -> Answer:
    """Wait for all ranks and agree with them whether to begin.

    Args:
        meeting: where the ranks meet.
        place: of this rank.
        record: what it reports.
        expected: hosts that should send somebody, for the message if they do not; may be empty.
        deadline: in time.monotonic().

    Raises:
        UserError: ranks are missing, came twice, run different code or share a GPU; the same line in all ranks.
    """
    store, mine = meeting.store, json.dumps(record)
    if store.compare_set(f"seat/{place.rank}", "", mine).decode() != mine:
        other = json.loads(store.get(f"seat/{place.rank}"))
        raise UserError(
            f"rank {place.rank} of {place.size} came twice: as process {other['pid']} on {other['host']} and as "
            f"{record['pid']} on {record['host']}; start each rank once, and each run at a port of its own"
        )
    if place.rank:
        return Answer(elsewhere=_listen(meeting, place, deadline))
    seats = [f"seat/{rank}" for rank in range(place.size)]
    everybody = _poll(lambda: store.check(seats), deadline)
    here = [json.loads(store.get(seat)) for seat in seats if everybody or store.check([seat])]
    problem = examine(here) if everybody else absent(here, place.size, expected, meeting.where)
    said = time.time()
    away = [one["address"] for one in here if one["host"] != record["host"] and one["address"]]
    elsewhere = next((address for address in away if not is_loopback(address)), "")
    store.set("verdict", json.dumps({"problem": problem, "elsewhere": elsewhere}))
    if problem:  # the others need the store to read it
        _poll(lambda: store.add("read", 0) == len(here) - 1, time.monotonic() + 3)
        raise UserError(problem)
    notes = [(logging.INFO, line) for line in mapping(here, meeting.where)]
    doubts = [*differences(here), *_clocks(meeting, here, said)]
    return Answer((*notes, *((logging.WARNING, f"warning: {line}") for line in doubts)), elsewhere)


def _listen(meeting: Meeting, place: Place, deadline: float) -> str:
    """Wait for what rank 0 says, which may have begun to wait later than this rank; an address elsewhere."""
    store = meeting.store
    if not _poll(lambda: store.check(["verdict"]), deadline + 5):
        raise UserError(
            f"rank {place.rank} of {place.size} on {socket.gethostname()} was at {meeting.where}, but rank 0 there "
            "said nothing any more; its own message says why"
        )
    store.set(f"clock/{place.rank}", repr(time.time()))
    verdict = json.loads(store.get("verdict"))
    store.add("read", 1)
    if verdict["problem"]:
        raise UserError(verdict["problem"])
    return str(verdict["elsewhere"])


def _poll(holds: Callable[[], bool], deadline: float) -> bool:
    """Whether a condition comes true in time. Waiting inside a store would end in pages of its own messages."""
    pause = 0.01
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.25)
    return True


def absent(here: Sequence[Record], size: int, expected: Sequence[str], where: str) -> str:
    """The line that says who is missing."""
    missing = sorted(set(range(size)) - {record["rank"] for record in here})
    silent = [host for host in expected if host not in {record["host"] for record in here}]
    hosts = f"nobody came from {', '.join(silent)}; " if silent else ""
    return (
        f"{_ranks(missing)} of {size} did not come to {where} in time; {hosts}here are "
        f"{'; '.join(f'{host}: {_ranks(ranks)}' for host, ranks in _by(here, 'host').items())}; "
        "see the messages of the missing ones, or give them longer with --join_timeout_seconds"
    )


def examine(here: Sequence[Record]) -> str:
    """Why these ranks cannot work together; empty if they can."""
    if len(_by(here, "code")) > 1:
        return f"different code on the ranks ({_where(here, 'code')}); bring all nodes to the same state"
    kinds = [{**record, "kind": record["device"].split(":")[0]} for record in here]
    if len(_by(kinds, "kind")) > 1:
        return f"not all ranks have a GPU ({_where(kinds, 'kind')}); give each one, or use --device cpu"
    for (host, uuid), ranks in _by(here, "host", "uuid").items():
        if uuid and len(ranks) > 1:
            return f"{_ranks(ranks)} share one GPU of {host}; start one rank per GPU, or use --device cpu"
    return ""


def differences(here: Sequence[Record]) -> list[str]:
    """Packages whose versions differ."""
    names = sorted({name for record in here for name in record["versions"]})
    versions = {name: [{**record, "version": record["versions"].get(name)} for record in here] for name in names}
    return [
        f"{name} differs between the nodes ({_where(records, 'version')})"
        for name, records in versions.items()
        if len(_by(records, "version")) > 1
    ]


def mapping(here: Sequence[Record], where: str) -> list[str]:
    """Who runs where, in a line for all nodes that are alike."""
    hosts: dict[str, list[Record]] = {}
    for record in here:
        hosts.setdefault(record["host"], []).append(record)
    backend = "NCCL, CPU tensors by gloo" if here[0]["device"].startswith("cuda") else "gloo"
    lines = [f"{len(here)} ranks on {len(hosts)} nodes met at {where}; they exchange tensors by {backend}"]
    alike: dict[str, list[str]] = {}
    for host, records in hosts.items():
        devices = list(dict.fromkeys(record["device"] for record in records))
        gpu = f" ({records[0]['gpu']})" if records[0]["gpu"] else ""
        number = "1 rank" if len(records) == 1 else f"{len(records)} ranks"
        alike.setdefault(f"{number} on {', '.join(devices)}{gpu}", []).append(host)
    return [*lines, *(f"{', '.join(names)}: {what}" for what, names in alike.items())]


def _clocks(meeting: Meeting, here: Sequence[Record], said: float) -> list[str]:
    """Clocks that differ from this rank's: each noted its time between the question and now."""
    keys = [f"clock/{rank}" for rank in range(1, len(here))]
    if not _poll(lambda: meeting.store.check(keys), time.monotonic() + 5):
        return []
    heard = time.time()
    shift: dict[str, float] = {}
    for record in here[1:]:
        noted = float(meeting.store.get(f"clock/{record['rank']}"))
        if noted < said - CLOCK_S or noted > heard + CLOCK_S:
            shift[record["host"]] = noted - said
    lines = []
    for host, seconds in shift.items():
        direction = "ahead of" if seconds > 0 else "behind"
        lines.append(f"the clock of {host} is {abs(seconds):.0f} s {direction} that of {here[0]['host']}")
    return lines


def _by(records: Sequence[Record], *keys: str) -> dict[Any, list[int]]:
    """Ranks by a value (or several) of their records."""
    found: dict[Any, list[int]] = {}
    for record in records:
        value = record[keys[0]] if len(keys) == 1 else tuple(record[key] for key in keys)
        found.setdefault(value, []).append(record["rank"])
    return found


def _where(records: Sequence[Record], key: str) -> str:
    """Which hosts have which value."""
    hosts: dict[Any, list[str]] = {}
    for record in records:
        hosts.setdefault(record[key], []).append(record["host"])
    return "; ".join(f"{value} on {', '.join(dict.fromkeys(names))}" for value, names in hosts.items())


def _ranks(numbers: Iterable[int]) -> str:
    """ "rank 3", or "ranks 1 2 4-7"."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    words = [str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans]
    return f"rank{'s' if len(spans) > 1 or len(spans[0]) > 1 else ''} {' '.join(words)}"
