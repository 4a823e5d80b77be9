"""The only training loop. A method says what the loss is; this file says when things happen."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clusterssl import checkpoint, dist, pulse
from clusterssl.data import Batch
from clusterssl.errors import DataGone, Stopped, UserError
from clusterssl.grace import Grace, read_grace
from clusterssl.monitor import Monitor
from clusterssl.parts import Parts
from clusterssl.preemption import StopRequest, requeue
from clusterssl.profiling import Profile
from clusterssl.progress import Progress
from clusterssl.step import Step
from clusterssl.watchdog import watching

logger = logging.getLogger(__name__)

AGREED = 4
"""facts that the ranks exchange after every step: stop, save, trouble, still saving"""


def fit(parts: Parts) -> None:
    """Train until the schedule ends, resuming from the run directory where a checkpoint is there.

    Raises:
        DataGone: the images are out of reach; the last checkpoint is there, and in a Slurm job the requeue asked for.
        UserError: non-finite loss, collapse with `stop_on_collapse`, too many unreadable images, full disk.
        Stopped: a signal asked for it; a checkpoint was written.
    """
    hang = watching(parts.schedule.hang_minutes, parts.world.rank)
    with StopRequest() as request, pulse.listening(parts.feed.heed), hang:
        try:
            _Training(parts, request).train()
        except DataGone:
            requeue("lost images")
            raise


class _Training:
    def __init__(self, parts: Parts, request: StopRequest) -> None:
        self.parts, self.request = parts, request
        self.feed, self.bad = parts.feed, parts.feed.ledger
        self.feed.request, self.feed.before_stop = request, parts.run.saver.finish
        self.one_step = Step(parts, self.watch)
        self.profile = Profile(parts.schedule.profile, parts.run.folder / "profile", parts.world, parts.model)
        self.feed.part = self.profile.part
        self.monitor = Monitor(parts.method.remedies)
        self.problem: UserError | None = None
        self.agreement = dist.Agreement(AGREED)
        self.step = 0
        self.steps_per_epoch = parts.feed.steps_per_epoch
        self.total = parts.schedule.epochs * self.steps_per_epoch
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=parts.world.device)
        self.loss_sum = torch.zeros((), device=parts.world.device, dtype=torch.float64)
        self.loss = torch.zeros((), device=parts.world.device)
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.grace: Grace | None = None

    def train(self) -> None:
        self.resume()
        try:
            self.parts.run.begin(self.step)
            self.announce()
            self.all_epochs()
        finally:
            self.profile.close()
            self.parts.run.close()

    def all_epochs(self) -> None:
        faster = self.feed.loader.faster
        self.progress = Progress(self.total, self.step, self.feed.global_batch, self.parts.world, faster)
        try:
            while self.step < self.total:
                self.epoch(self.step // self.steps_per_epoch)
            self.agreement.finish()
            self.profile.finish()
        finally:
            self.progress.close()

    def announce(self) -> None:
        """In a Slurm job, say whether the time it leaves after a signal is enough for a save."""
        parts = self.parts
        self.grace = read_grace() if parts.world.is_main else None
        if self.step < self.total and dist.broadcast_object(self.grace is not None):
            seconds = checkpoint.rehearse(parts.run, parts.model, parts.optimizer, parts.method)
            if self.grace is not None:
                self.grace.tell(seconds)
                self.grace = self.grace if self.grace.fits(seconds) else None

    def epoch(self, epoch: int) -> None:
        method, start = self.parts.method, self.step % self.steps_per_epoch
        if start == 0:
            self.one_step.seed(self.step)
            with self.profile.part("labels"):
                method.begin_epoch(epoch)
        self.parts.model.train()
        for batches in self.progress.timed(self.batches(epoch, start)):
            self.refresh()
            self.learn(batches)
            last = self.step % self.steps_per_epoch == 0
            if last or self.step % self.log_every() == 0:
                self.log(epoch)
            if last:
                self.end_epoch(epoch)
            self.save_or_stop()
            self.profile.step()

    def learn(self, batches: list[Batch]) -> None:
        """One step; nothing in here waits for the device, but for the GradScaler of --amp_dtype fp16."""
        self.keep_count(self.one_step(self.step, batches))

    def refresh(self) -> None:
        """Let the method look at all images between two steps; a stop in there falls back to the checkpoint."""
        if self.parts.method.due(self.step):
            if self.saved_step != self.step:
                self.save(wait=True)
            self.parts.run.saver.finish()
            self.one_step.seed(self.step)
            with self.profile.part("labels"):
                self.parts.method.refresh(self.step)
            self.parts.model.train()

    def log_every(self) -> int:
        """Steps between two records; closer at the start, where runs go wrong."""
        return min(self.parts.schedule.log_freq, 5) if self.step <= 100 else self.parts.schedule.log_freq

    def batches(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        """Steps of an epoch; a rank that cannot load goes on with old images until all ranks have agreed to stop."""
        source, last, failed = self.feed.loader.epoch(epoch, start, self.parts.method.order(epoch)), None, False
        while True:
            first = last is None
            try:
                with self.profile.part("data"):
                    last = next(source)
            except StopIteration:
                return
            except UserError as error:
                self.problem, failed = error, True
            if first:
                dist.raise_together(self.problem)  # there are no old images to go on with
            assert last is not None
            yield last
            if failed:
                yield last  # the agreement is one step late
                assert self.problem is not None
                raise self.problem

    def watch(self, batch: Batch) -> None:
        if self.parts.method.seen is not None:
            self.monitor.observe(self.parts.method.seen)
        try:
            self.bad.add(batch.bad)
        except UserError as error:  # raised at the step's end, in all ranks together
            self.problem = error

    def keep_count(self, loss: Tensor) -> None:
        """Note the loss and the first step at which it was not finite, without waiting for the device."""
        first = (self.first_bad_step < 0) & ~torch.isfinite(loss)
        self.first_bad_step = torch.where(first, self.step, self.first_bad_step)
        self.loss = loss
        self.loss_sum += loss
        self.step += 1
        pulse.beat(f"step {self.step} of {self.total}")

    def check_finite(self) -> None:
        bad_step = int(dist.all_reduce_(self.first_bad_step.clone(), "max"))
        if bad_step >= 0:
            raise UserError(f"the loss was not finite at step {bad_step}; {checkpoint.way_back(self.parts.run)}")

    def log(self, epoch: int) -> None:
        self.check_finite()
        loss = float(dist.all_reduce_(self.loss.clone(), "mean"))
        record: dict[str, Any] = {"epoch": epoch, "step": self.step, "loss": loss}
        record["lr"] = self.parts.optimizer.param_groups[0]["lr"]
        record |= self.progress.rates(self.step)
        seen = self.parts.method.seen
        if seen is not None:
            record |= self.monitor.measure(loss, seen)
        record["bad_images"] = self.bad.count
        self.parts.run.log(record)
        self.progress.show(record)
        if self.monitor.verdict and self.parts.schedule.stop_on_collapse:
            raise UserError(f"--stop_on_collapse: stopped at step {self.step}, {self.monitor.verdict}")

    def end_epoch(self, epoch: int) -> None:
        mean = float(dist.all_reduce_(self.loss_sum.clone(), "mean")) / self.steps_per_epoch
        self.loss_sum.zero_()
        occupancy = self.monitor.epoch_occupancy()
        self.parts.run.log({"epoch_end": epoch, "loss": mean, "occupancy": occupancy})
        self.progress.row(epoch, self.step, mean, self.parts.optimizer.param_groups[0]["lr"], occupancy)
        every = self.parts.schedule.checkpoint_freq
        last = self.step == self.total
        kept = f"ckp-{epoch}.pth" if last or (every > 0 and epoch % every == 0) else ""
        self.save(keep_as=kept, wait=last)

    def save_or_stop(self) -> None:
        """Save when time is up and stop when a signal came, in all ranks at the same step."""
        minutes, saver = self.parts.schedule.checkpoint_minutes, self.parts.run.saver
        due = time.monotonic() - self.saved_at >= 60 * minutes
        facts = [bool(self.request.received), due, self.problem is not None or saver.failed, saver.busy]
        stop, due_somewhere, problem, busy = self.agreement.exchange([int(fact) for fact in facts])
        if problem:
            self.agreement.finish()
            saver.finish()
            dist.raise_together(self.problem)
        if self.step == self.total:
            return
        # The answer is one step old, so a save of the step before has already met what it asks for.
        fresh = self.step - self.saved_step <= (0 if minutes == 0 else 1)
        periodic = not fresh and (minutes == 0 or (due_somewhere and not busy))
        if periodic or (stop and self.step != self.saved_step):
            self.save(wait=bool(stop))
        if stop:
            self.stop()

    def stop(self) -> None:
        self.agreement.finish()
        self.parts.run.saver.finish()
        requeue(self.request.received)
        name = self.request.received or "a signal to another rank"
        raise Stopped(f"stopped by {name} after step {self.step} of {self.total}; the same command continues there")

    def save(self, keep_as: str = "", wait: bool = False) -> None:
        """Start to write a checkpoint, when the one before is complete, or write it and `wait` for its end."""
        dist.raise_together(self.problem)  # no checkpoint of a step in which a rank went on with old images
        self.check_finite()
        state = {"epoch": self.step // self.steps_per_epoch, "scaler": self.one_step.scaler.state_dict()}
        state["loss_sum"] = float(dist.all_reduce_(self.loss_sum.clone(), "mean"))
        state["model"] = self.parts.record
        state["monitor"] = self.monitor.state_dict()
        wait = wait or self.parts.schedule.checkpoint_minutes == 0
        checkpoint.save(
            self.parts.run, self.parts.model, self.parts.optimizer, self.parts.method, state, self.step, keep_as, wait
        )
        self.saved_at, self.saved_step = time.monotonic(), self.step
        if self.grace is not None and not self.grace.fits(self.parts.run.saver.seconds):
            self.grace.tell(self.parts.run.saver.seconds)
            self.grace = None  # said once

    def resume(self) -> None:
        state = checkpoint.load(self.parts.run, self.parts.model, self.parts.optimizer, self.parts.method)
        if state is None:
            return
        if state["scaler"] and self.one_step.scaler.is_enabled():  # the precision may differ from the first start's
            self.one_step.scaler.load_state_dict(state["scaler"])
        self.monitor.load_state_dict(state["monitor"])
        self.step = state["step"]
        self.loss_sum.fill_(state["loss_sum"])
        epoch, within = divmod(self.step, self.steps_per_epoch)
        if self.step >= self.total:
            logger.info("already trained for %d epochs; nothing to do", epoch)
        else:
            logger.info("resuming at epoch %d, step %d of %d", epoch, within, self.steps_per_epoch)
