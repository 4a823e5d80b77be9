"""The plan as rows of a table, and what stands against it."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from clusterssl.plan.between import Between, between_epochs
from clusterssl.plan.blueprint import Blueprint
from clusterssl.plan.measured import Speed
from clusterssl.plan.network import Network, Share, shares
from clusterssl.plan.rehearsal import Rehearsed

RESIDENT = "Python and PyTorch"
PREFETCH = 2
"""batches that every loader process has ready"""


class Row(NamedTuple):
    """One line."""

    section: str
    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Job:
    """Where a training is to run, and what is known of that place."""

    nodes: int
    per_node: int
    gpu: bool
    network: Network
    gpu_memory_gb: float = 0.0
    """0: unknown"""

    @property
    def ranks(self) -> int:
        """Of the job."""
        return self.nodes * self.per_node


@dataclass
class Plan:
    """Everything that the table says, as numbers."""

    blueprint: Blueprint
    job: Job
    rehearsed: Rehearsed
    speeds: Sequence[Speed] = ()
    between: Between | None = field(init=False)
    shares: list[Share] = field(init=False)

    def __post_init__(self) -> None:
        self.between = between_epochs(self.rehearsed.method, self.config, self.job.ranks, gpu=self.job.gpu)
        self.shares = shares(self.rehearsed.messages, self.job.ranks, self.job.network)

    @property
    def config(self) -> Any:
        """Of the script."""
        return self.blueprint.config

    @property
    def device_bytes(self) -> int:
        """Peak of one rank, in a step or between two epochs."""
        lasting = sum(self.rehearsed.memory.values()) - self.rehearsed.memory["crops"]
        return max(self.rehearsed.peak, lasting + (self.between.device if self.between else 0))

    @property
    def host_bytes(self) -> dict[str, int]:
        """Of one rank, by what it is for; of a rank without a GPU, beside what the step takes."""
        loader = self.rehearsed.feed.loader
        batch = loader.batch_size * sum(3 * height * width for height, width in loader.multicrop.sizes)
        workers = min(self.config.data.workers, os.cpu_count() or 1) if not self.job.gpu else self.config.data.workers
        process = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        held = {RESIDENT: process, "batches ready": (PREFETCH * workers + 2) * batch}
        held["copy while a checkpoint is written"] = sum(self.rehearsed.files.values())
        return held | ({"features of all images": self.between.host} if self.between and self.between.host else {})

    def problems(self) -> list[str]:
        """Why it cannot work, where flags alone did not tell."""
        found, limit = [], self.job.gpu_memory_gb
        if self.job.gpu and 0 < limit < self.device_bytes / 1e9:
            needed = f"{self.device_bytes / 1e9:.1f} GB on each GPU, there are --gpu_memory_gb {limit:g}"
            found.append(f"{needed}: lower --batch_size and raise --accumulate, or take a smaller --arch")
        return found

    def rows(self) -> Iterator[Row]:
        """The table."""
        yield from self._run()
        yield from self._memory()
        yield from self._host()
        yield from self._network()
        yield from self._disk()
        yield from self._time()

    def _run(self) -> Iterator[Row]:
        feed, optim, job = self.rehearsed.feed, self.config.optim, self.job
        left = feed.num_images - feed.steps_per_epoch * feed.global_batch
        note = f"{left} of {feed.num_images} images are in none" if left > 0 else ""
        where = f"{job.ranks} = {job.nodes} x {job.per_node}"
        each = f"{optim.batch_size} x {optim.accumulate} x {job.ranks}"
        yield Row("run", "method", self.blueprint.name, f"{self.config.model.arch}, crops {_crops(self.config)}")
        yield Row("run", "ranks", where, "GPUs" if job.gpu else "CPUs")
        yield Row("run", "images of a step", str(feed.global_batch), each)
        yield Row("run", "steps of an epoch", str(feed.steps_per_epoch), note)
        yield Row("run", "steps in all", str(feed.steps_per_epoch * optim.epochs), f"{optim.epochs} epochs")

    def _memory(self) -> Iterator[Row]:
        section, lasting = "memory of a GPU" if self.job.gpu else "memory of a rank", self.rehearsed.memory
        for name, nbytes in lasting.items():
            yield Row(section, name, size(nbytes))
        work = self.rehearsed.peak - sum(lasting.values())
        yield Row(section, "activations and work", size(max(work, 0)), "at the worst moment of a step")
        if self.between and self.between.device:
            yield Row(section, "between two epochs", size(self.between.device), self.between.what)
        missing = "without CUDA's context, workspaces of cuDNN and NCCL, fragmentation" if self.job.gpu else ""
        yield Row(section, "peak", size(self.device_bytes), missing)

    def _host(self) -> Iterator[Row]:
        for name, nbytes in self.host_bytes.items():
            notes = {RESIDENT: "of this process here, shared with its workers",
                     "batches ready": f"uint8, {PREFETCH} for each of {self.config.data.workers} workers"}  # fmt: skip
            yield Row("memory of a node", name, f"{self.job.per_node} x {size(nbytes)}", notes.get(name, ""))
        yield Row("memory of a node", "together", size(self.job.per_node * sum(self.host_bytes.values())))

    def _network(self) -> Iterator[Row]:
        if self.job.ranks == 1:
            return
        for share in self.shares:
            note = f"{share.calls} {share.kind}{'s' if share.calls > 1 else ''}, {1e3 * share.seconds:.3g} ms"
            note += "" if share.waited else " while the step goes on"
            yield Row("network, a step", share.label, size(share.nbytes), note)
        network, total = self.job.network, sum(share.seconds for share in self.shares)
        latency = f"{network.latency_us:g} us between nodes, {network.local_latency_us:g} within"
        stated = f"at {network.bandwidth_gbps:g} Gb/s a node and {latency}, nothing at once"
        yield Row("network, a step", "together", f"{1e3 * total:.3g} ms", stated)
        if self.between:
            each = f"and {size(self.between.each_pass)} with each pass" if self.between.each_pass else ""
            yield Row("network, an epoch", self.between.what, size(self.between.sent), each)

    def _disk(self) -> Iterator[Row]:
        files, ranks = self.rehearsed.files, self.job.ranks
        whole = sum(nbytes * (ranks if "rank" in name else 1) for name, nbytes in files.items())
        for name, nbytes in files.items():
            yield Row("disk", name, size(nbytes), f"one for each of {ranks} ranks" if "rank" in name else "")
        every, epochs = self.config.run.checkpoint_freq, self.config.optim.epochs
        kept = 1 + (math.ceil(epochs / every) if every > 0 else 0)
        total = 3 * whole + kept * files["checkpoint.pth.tar"]
        told = f"this checkpoint, the one before, the next while it is written, at most {kept} kept ones"
        yield Row("disk", "run directory", size(total), told)

    def _time(self) -> Iterator[Row]:
        if not self.speeds:
            yield Row("time", "images/s, hours", "unknown", "no figure in bench/results is of such a training")
        seen = self.rehearsed.feed.steps_per_epoch * self.rehearsed.feed.global_batch * self.config.optim.epochs
        for speed in self.speeds:
            together = speed.images_per_s * self.job.ranks
            note = f"{speed.source}: {speed.images_per_s:.0f} images/s and rank; no network, no disk"
            yield Row("time", "images/s, hours", f"{together:.0f}, {seen / together / 3600:.2g} h", note)


def table(rows: Sequence[Row]) -> str:
    """Aligned columns, a section's name on its first line."""
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines, before = [], ""
    for row in rows:
        cells = ["" if row.section == before else row.section, row.name, row.value]
        padded = [
            cell.rjust(width) if i == 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append("  ".join([*padded, row.note]).rstrip())
        before = row.section
    return "\n".join(lines)


def size(nbytes: float) -> str:
    """Bytes in the unit that suits them, powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}" if nbytes < 1e3 * scale else f"{nbytes / scale:.0f} {unit}"
    return f"{nbytes:.0f} B"


def _crops(config: Any) -> str:
    pairs = zip(config.data.nmb_crops, config.data.size_crops, strict=True)
    return " + ".join(f"{number} x {side}" for number, side in pairs)
