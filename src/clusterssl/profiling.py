"""Where the time of a step goes: a table of its parts and a trace of its operators, of a few steps of a run.

The parts cover a step without gap or overlap: a part inside another takes its time from it. On a GPU each also shows
how long the stream took between the same two points, which holds what it waited for the host. Off, a part costs the
call of one function and the entry of an empty context.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from clusterssl.dist import World
from clusterssl.files import atomic_write, first_line, make_folder

logger = logging.getLogger(__name__)

PARTS = {
    "data": "waiting for data",
    "copy": "copy to the device",
    "augmentation": "augmentation",
    "forward": "forward pass",
    "assignment": "assignment, queue, loss",
    "backward": "backward pass, gradient exchange",
    "optimiser": "optimiser",
    "labels": "labels of all images",
    "other": "log, checkpoint, the rest",
}
WARM_UP = 3
"""steps before the profiler is switched on; one more passes while it gets ready"""
_OPERATORS = 10
_NOTHING = nullcontext()


def unprofiled(name: str) -> AbstractContextManager[Any]:
    """The context of a part of a step of which nobody takes the time."""
    return _NOTHING


class Mark(NamedTuple):
    """End of a stretch of time that one part took."""

    part: str
    host_s: float
    device: Any
    """event of the device's stream, None without one"""


class Profile:
    """Takes the time of some steps of the main rank apart; does nothing on other ranks."""

    def __init__(self, steps: int, folder: Path, world: World, model: nn.Module) -> None:
        """Args: how many steps (0: none), where the files go, this process's place, the network as methods call it."""
        self._steps, self._folder, self._model = (steps if world.is_main else 0), folder, model
        self._cuda = world.device.type == "cuda"
        self._seen = 0
        self._profiler: profile | None = None
        self._marks: list[Mark] = []
        self._inside: list[str] = []
        self._forwards: list[AbstractContextManager[Any]] = []
        self._hooks: list[Any] = []

    def part(self, name: str) -> AbstractContextManager[Any]:
        """Context of a part of a step, one of `PARTS`."""
        return self._timed(name) if self._marks else _NOTHING

    def step(self) -> None:
        """A step is over."""
        if self._steps == 0:
            return
        self._seen += 1
        if self._seen == WARM_UP:
            self._begin()
        elif self._seen == WARM_UP + 1:
            assert self._profiler is not None
            self._profiler.step()
            self._take_times()
        elif self._marks and self._seen > WARM_UP + 1:
            if self._seen == WARM_UP + 1 + self._steps:
                self.finish()
            else:
                assert self._profiler is not None
                self._profiler.step()

    def finish(self) -> None:
        """Write what the steps so far gave, if any were profiled; the run goes on or ends."""
        steps = self._seen - WARM_UP - 1
        if self._profiler is None or not self._marks or steps < 1:
            if self._steps and self._seen <= WARM_UP + 1:
                logger.warning("--profile %d: the run ended before its first %d steps", self._steps, WARM_UP + 2)
            return
        self._settle()
        self._mark("other")
        marks, profiler = self._marks, self._profiler
        self.close()
        try:
            text = report(marks, profiler, steps, self._seen)
            logger.info("%s", text)
            make_folder(self._folder)
            atomic_write(self._folder / "steps.txt", lambda file: file.write(f"{text}\n".encode()))
            with tempfile.TemporaryDirectory(dir=self._folder) as aside:
                whole = Path(aside) / "trace.json.gz"
                profiler.export_chrome_trace(str(whole))
                whole.replace(self._folder / whole.name)
        except Exception as error:  # whatever a diagnosis meets, the run goes on
            logger.warning("--profile: %s could not be written (%s)", self._folder, first_line(error))

    def close(self) -> None:
        """Switch the profiler off, if it is on; raises nothing."""
        profiler, self._profiler, self._marks = self._profiler, None, []
        self._steps = 0
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if profiler is not None:
            try:
                profiler.stop()
            except Exception as error:
                logger.warning("--profile: the profiler did not stop (%s)", first_line(error))

    def _begin(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it complains of a missing GPU on every CPU
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profiler = profile(activities=kinds, schedule=schedule(wait=0, warmup=1, active=self._steps + 1))
        self._profiler.start()

    def _take_times(self) -> None:
        self._hooks = [
            self._model.register_forward_pre_hook(self._enter_forward),
            self._model.register_forward_hook(self._leave_forward, always_call=True),
        ]
        self._settle()
        self._mark("other")

    def _settle(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _mark(self, part: str) -> None:
        event = torch.cuda.Event(enable_timing=True) if self._cuda else None
        if event is not None:
            with contextlib.suppress(RuntimeError):  # of the device, which what comes next will tell of
                event.record()
        self._marks.append(Mark(part, time.perf_counter(), event))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self._mark(self._inside[-1] if self._inside else "other")
        self._inside.append(name)
        try:
            with record_function(PARTS[name]):
                yield
        finally:
            self._mark(self._inside.pop())

    def _enter_forward(self, *_: Any) -> None:
        self._forwards.append(self.part("forward"))
        self._forwards[-1].__enter__()

    def _leave_forward(self, *_: Any) -> None:
        if self._forwards:
            self._forwards.pop().__exit__(None, None, None)


def shares(marks: list[Mark]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of every part on the host, and between the same points of the device's stream, empty without one."""
    host: dict[str, float] = defaultdict(float)
    device: dict[str, float] = defaultdict(float)
    for before, mark in pairwise(marks):
        host[mark.part] += mark.host_s - before.host_s
        if mark.device is not None:
            device[mark.part] += before.device.elapsed_time(mark.device) / 1e3
    return dict(host), dict(device)


def report(marks: list[Mark], profiler: profile, steps: int, last: int) -> str:
    """The tables as text: parts of a step, and the operators that take longest."""
    host, device = shares(marks)
    whole = sum(host.values())
    lines = [f"--profile: {steps} steps, up to step {last} of this start, {1e3 * whole / steps:.2f} ms each; the "
             "profiler's own cost is in there", "", f"{'part of a step':34}{_heading('host')}"
             + (_heading("device") if device else "")]  # fmt: skip
    for name, words in PARTS.items():
        lines.append(f"{words:34}{_cells(host, name, steps)}" + (_cells(device, name, steps) if device else ""))
    all_of_it = [{"all": sum(found.values())} for found in (host, device) if found]
    lines += ["".join([f"{'together':34}", *(_cells(found, "all", steps) for found in all_of_it)]), ""]
    return "\n".join([*lines, *_operators(profiler, steps, bool(device))])


def _heading(where: str) -> str:
    return f"{where + ' ms':>12}{'%':>7}"


def _cells(seconds: dict[str, float], name: str, steps: int) -> str:
    mine, whole = seconds.get(name, 0.0), max(sum(seconds.values()), 1e-12)
    return f"{1e3 * mine / steps:12.2f}{100 * mine / whole:7.1f}"


def _operators(profiler: profile, steps: int, on_device: bool) -> list[str]:
    """The operators whose own time is longest, on the device if there is one."""
    averages = profiler.key_averages()
    found = [event for event in averages if event.device_type == DeviceType.CPU and not event.is_user_annotation]

    def own(event: Any) -> float:
        return float(event.self_device_time_total if on_device else event.self_cpu_time_total)

    lines = [f"{'operators by their own time':34}{'calls':>12}{'host ms':>12}" + (f"{'device ms':>12}" * on_device)]
    for event in sorted(found, key=own, reverse=True)[:_OPERATORS]:
        line = f"{event.key[:33]:34}{event.count / steps:12.1f}{event.self_cpu_time_total / 1e3 / steps:12.2f}"
        lines.append(line + f"{event.self_device_time_total / 1e3 / steps:12.2f}" * on_device)
    if on_device:
        busy = sum(event.self_device_time_total for event in found) / 1e3 / steps
        lines.append(f"all operators together keep the device busy for {busy:.2f} ms a step")
    return lines
