"""A run that is disturbed and started again by the same command until it ends, and what became of it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clusterssl.files import read_checkpoint
from tests.launch import ROOT, Launched, metrics

RANKS = 2
FLAGS = [
    *("--report", "false"),
    *("--data_path", "digits", "--nmb_crops", "2", "1", "--size_crops", "16", "12", "--min_scale_crops", "0.4", "0.2"),
    *(
        "--max_scale_crops",
        "1",
        "0.5",
        "--arch",
        "conv4w4",
        "--hidden_mlp",
        "16",
        "--feat_dim",
        "8",
        "--base_lr",
        "0.5",
    ),
    *("--nmb_prototypes", "12", "--queue_length", "256", "--epoch_queue_starts", "1", "--batch_size", "64"),
    *("--warmup_epochs", "1", "--epochs", "4", "--checkpoint_freq", "1", "--checkpoint_minutes", "0", "--workers", "0"),
    *("--log_freq", "1", "--join_timeout_seconds", "6", "--device", "cpu"),
]
"""a run of 28 steps on two ranks, with a checkpoint after each and state that is split over them"""

MOST_STARTS = 25
PATIENCE_S = 30.0
"""for the end of all ranks after the first has ended: they notice by themselves"""


class Life:
    """One start of a run."""

    def __init__(self, folder: Path, flags: list[str], env: dict[str, str]) -> None:
        words = ["main_swav.py", *flags, "--dump_path", str(folder)]
        words[0] = str(ROOT / words[0])
        self.folder, self.began = folder, last_step(folder)
        self.launched = Launched("tests/chaos/rank.py", *words, ranks=RANKS, env=env)
        self.sessions = {process.pid for process in self.launched.processes}

    def alive(self) -> bool:
        """Whether all ranks run."""
        return all(process.poll() is None for process in self.launched.processes)

    def steps(self) -> int:
        """Steps done since this start, as far as the run directory tells."""
        return last_step(self.folder) - self.began

    def wait_for_step(self, steps: int = 1) -> None:
        """Until so many steps are done since this start, or a rank has ended."""
        while self.alive() and self.steps() < steps:
            time.sleep(0.005)

    def end(self, patience_s: float) -> tuple[list[int], str, int]:
        """Exit codes, what was printed, and how many ranks had to be killed as they did not end after the first."""
        deadline = time.monotonic() + 240
        while self.alive():
            assert time.monotonic() < deadline, f"the run does not end: {self.launched.processes[0].texts}"
            time.sleep(0.01)
        deadline, forced = time.monotonic() + patience_s, 0
        while time.monotonic() < deadline and any(one.poll() is None for one in self.launched.processes):
            time.sleep(0.01)
        for process in self.launched.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGQUIT)
                time.sleep(0.3)
                process.send_signal(signal.SIGKILL)
                forced += 1
        return *self.launched.wait(30), forced


@dataclass
class Story:
    """What became of a run."""

    folder: Path
    codes: list[list[int]] = field(default_factory=list)
    """of the ranks of each start"""
    printed: list[str] = field(default_factory=list)
    forced: int = 0
    """ranks that did not end after another had ended"""
    lost: int = 0
    """most steps that were done after the last checkpoint"""
    orphans: list[str] = field(default_factory=list)
    inside: int = 0
    """starts that ended within a save"""

    @property
    def restarts(self) -> int:
        return len(self.codes) - 1

    @property
    def ended(self) -> str:
        """Exit codes that occurred before the last start, in words."""
        codes = {code for life in self.codes[:-1] for code in life}
        return ", ".join(signal.Signals(-code).name if code < 0 else str(code) for code in sorted(codes)) or "0"


def endure(
    folder: Path,
    disturb: Callable[[Life, int], Any],
    *flags: str,
    between: Callable[[], Any] = lambda: None,
    patience_s: float = PATIENCE_S,
    env: dict[str, str] | None = None,
) -> Story:
    """Start a run again and again until all ranks end with 0.

    Args:
        folder: the run directory.
        disturb: does the harm, given what was started and how often that happened before.
        flags: beyond `FLAGS`.
        between: called after each end that was not the last.
        patience_s: after which ranks that outlive the first one are killed.
        env: variables of all ranks.
    """
    story = Story(folder)
    for number in range(MOST_STARTS):
        life = Life(folder, [*FLAGS, *flags], env or {})
        try:
            disturb(life, number)
            codes, printed, forced = life.end(patience_s)
        except BaseException:
            life.launched.send(signal.SIGKILL)
            raise
        story.codes.append(codes)
        story.printed.append(printed)
        story.forced += forced
        story.orphans += orphans(life.sessions)
        if not any(codes):
            return story
        story.inside += inside_a_save(folder)
        story.lost = max(story.lost, last_step(folder) - saved_step(folder))
        between()
    raise AssertionError(f"not done after {MOST_STARTS} starts: {story.codes}\n{story.printed[-1]}")


def last_step(folder: Path) -> int:
    """Last step in the run directory's records."""
    return max((record.get("step", 0) for record in metrics(folder)), default=0)


def saved_step(folder: Path) -> int:
    """Step of the current checkpoint, 0 without one."""
    path = folder / "checkpoint.pth.tar"
    return int(read_checkpoint(path)["step"]) if path.exists() else 0


def inside_a_save(folder: Path) -> bool:
    """Whether the last start ended within a save: something is half written, or not yet removed."""
    steps = {int(path.name.split(".")[1][4:]) for path in folder.glob("checkpoint.step*.pth")}
    return any(folder.rglob(".*.tmp")) or len(steps) > 2 or max(steps, default=0) > saved_step(folder)


def orphans(sessions: set[int], patience_s: float = 15.0) -> list[str]:
    """Processes of these sessions that do not end; the workers of a killed rank need some seconds to notice."""
    deadline = time.monotonic() + patience_s
    while (left := list(_members(sessions))) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def _members(sessions: set[int]) -> Iterator[str]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            command = (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:  # it has ended
            continue
        if int(session) in sessions and state != "Z":
            yield f"{folder.name}: {command}"


def whole_run(folder: Path, *flags: str) -> Path:
    """The same run, undisturbed."""
    story = endure(folder, lambda life, number: None, *flags)
    assert story.restarts == 0, story.printed
    return folder


def difference(folder: Path, whole: Path) -> str:
    """In what a run directory differs from another's: files, all tensors bit by bit, losses; empty if in nothing."""
    names = [{str(path.relative_to(root)) for path in root.rglob("*")} for root in (folder, whole)]
    if names[0] != names[1]:
        return f"files {names[0] ^ names[1]}"
    for name in sorted(name for name in names[0] if name.endswith((".pth", ".tar"))):
        if not equal(read_checkpoint(folder / name), read_checkpoint(whole / name)):
            return f"values in {name}"
    losses = [{r["step"]: r["loss"] for r in metrics(root) if "step" in r} for root in (folder, whole)]
    return "" if losses[0] == losses[1] else "losses"


def equal(one: Any, other: Any) -> bool:
    """Whether two checkpoints hold the same, bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)
