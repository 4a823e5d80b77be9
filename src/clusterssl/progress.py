"""What a run shows while it trains: on a terminal a bar and a table, otherwise a line now and then, and its speed."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from clusterssl.dist import World

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 10.0
_FIRST_STEPS = 2
"""of a start, which compile, choose kernels, take up memory and wait for workers: no speed is judged by them"""
_LONG_WAIT = 0.1
"""share of the time waiting for data above which something is said"""
_JUDGED_SECONDS = 30.0
_COLUMNS = {"epoch": 6, "loss": 9, "lr": 10, "occupied": 12, "images/s": 10, "wait": 6, "to go": 15}
"""of the table, with their widths"""


class Progress:
    """Speed, share of the time spent waiting for data, and time to go."""

    def __init__(
        self, total: int, done: int, images_per_step: int, world: World, faster: Callable[[], str] | None = None
    ) -> None:
        """Args: optimiser steps in all and already done, images of a step over all ranks, what would load faster."""
        self._faster, self._judged, self._judged_wait = faster, 0.0, 0.0
        self._total, self._images, self._main, self._device = total, images_per_step, world.is_main, world.device
        self._seen, self._headed = 0, False
        """steps of this start"""
        self._measure_from(done)
        self._shown = self._start
        on_terminal = world.is_main and sys.stderr.isatty() and shutil.get_terminal_size((0, 0)).columns > 0
        self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True) if on_terminal else None

    def _measure_from(self, step: int) -> None:
        """Forget all times."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._start, self._first = time.monotonic(), step
        self._since, self._since_step, self._waited = self._start, step, 0.0
        self._epoch: tuple[float, int, float] = (self._start, step, 0.0)
        """time, step and seconds waited for data at the last row of the table"""
        self._line = self._epoch
        """the same at the last line"""
        self._waited_before = 0.0

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Pass batches on and measure how long each was waited for."""
        iterator = iter(batches)
        while True:
            began = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.monotonic() - began
            yield batch
            self._seen += 1
            if self._seen == _FIRST_STEPS:
                self._measure_from(self._first + _FIRST_STEPS)
            if self._bar is not None:
                self._bar.update()

    def rates(self, step: int) -> dict[str, float]:
        """Images per second over all ranks and share of the time waiting for data, since the last call."""
        now = time.monotonic()
        elapsed = max(now - self._since, 1e-9)
        rates = {
            "images_per_s": round((step - self._since_step) * self._images / elapsed, 1),
            "data_wait": round(min(self._waited / elapsed, 1.0), 4),
        }
        self._judge(elapsed, self._waited, first=self._since == self._start)
        self._waited_before += self._waited
        self._since, self._since_step, self._waited = now, step, 0.0
        return rates

    def _judge(self, elapsed: float, waited: float, first: bool) -> None:
        """Say once that the data is what the run waits for; the first interval holds the start of the workers."""
        if self._faster is None or first:
            return
        self._judged, self._judged_wait = self._judged + elapsed, self._judged_wait + waited
        if self._judged < _JUDGED_SECONDS:
            return
        share = self._judged_wait / self._judged
        if share > _LONG_WAIT:
            if self._main:
                logger.warning("%.0f %% of the time goes into waiting for data: %s", 100 * share, self._faster())
            self._faster = None
        self._judged = self._judged_wait = 0.0

    def show(self, record: dict[str, Any]) -> None:
        """Show a logged record: on the bar, or as a line when the last one is some seconds ago or the run ends."""
        if not self._main:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"epoch {record['epoch']}, loss {record['loss']:.3f} (ln K {record.get('ln_k', float('nan')):.2f}), "
                f"{record['images_per_s']:.0f} images/s, wait {record['data_wait']:.0%}"
            )
        now, step = time.monotonic(), record["step"]
        if now - self._shown < _SECONDS_BETWEEN_LINES and step < self._total:
            return
        self._shown, extra = now, {"file_only": self._bar is not None}
        speed, wait, self._line = self._since_then(self._line, step)
        logger.info(
            "epoch %d, step %d/%d, loss %.4f (ln K %.3f), lr %.3g, %.0f images/s, waiting for data %.0f %%, %s to go",
            record["epoch"], step, self._total, record["loss"], record.get("ln_k", float("nan")), record["lr"],
            speed, 100 * wait, self._to_go(step), extra=extra,
        )  # fmt: skip

    def row(self, epoch: int, step: int, loss: float, rate: float, occupancy: Sequence[int]) -> None:
        """On a terminal, add an epoch to the table.

        Args:
            epoch: that has ended.
            step: optimiser steps done.
            loss: mean over the epoch.
            rate: learning rate of its last step.
            occupancy: assignments per prototype in it; empty where none are counted.
        """
        if self._bar is None:
            return
        speed, wait, self._epoch = self._since_then(self._epoch, step)
        used = f"{sum(count > 0 for count in occupancy)}/{len(occupancy)}" if occupancy else "-"
        cells = (str(epoch), f"{loss:.4f}", f"{rate:.3g}", used, f"{speed:.0f}", f"{wait:.0%}", self._to_go(step))
        for line in (_COLUMNS, cells)[self._headed :]:
            words = (word.rjust(width) for word, width in zip(line, _COLUMNS.values(), strict=True))
            self._bar.write("".join(words), file=sys.stderr)
        self._headed = True

    def _since_then(self, then: tuple[float, int, float], step: int) -> tuple[float, float, tuple[float, int, float]]:
        """Images a second and share of waiting since a time, step and seconds waited; the same three of now."""
        now, waited = time.monotonic(), self._waited_before + self._waited
        elapsed = max(now - then[0], 1e-9)
        return (step - then[1]) * self._images / elapsed, min((waited - then[2]) / elapsed, 1.0), (now, step, waited)

    def _to_go(self, step: int) -> str:
        """Time until the last step, at the speed since the first steps of this start."""
        if step < self._total and self._seen < _FIRST_STEPS:
            return "?"
        return duration((time.monotonic() - self._start) / max(step - self._first, 1) * (self._total - step))

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds, in words."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
