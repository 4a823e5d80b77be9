"""The faults of one machine: each function lets one happen to a run and tells what became of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from PIL import Image

from tests.chaos.harness import RANKS, Life, Story, endure, saved_step

HANG = ("--hang_minutes", "0.2")


def killed(folder: Path, chance: Random, kills: int) -> Story:
    """SIGKILL of a random rank, so many times: while the run starts, within a save, at any other moment."""

    def kill(life: Life, number: int) -> None:
        if number >= kills:
            return
        when, rank = chance.choices(("start", "save", "step"), (1, 4, 4))[0], chance.randrange(RANKS)
        if when == "start":
            time.sleep(chance.uniform(0, 1))
        else:
            life.wait_for_step(chance.randint(1, 3))
            _wait_for_save(life) if when == "save" else time.sleep(chance.uniform(0, 0.2))
        life.launched.send(signal.SIGKILL, rank)

    return endure(folder, kill)


def _wait_for_save(life: Life) -> None:
    while life.alive() and not any(name.endswith(".tmp") for name in os.listdir(life.folder)):  # noqa: PTH208 - quick
        pass


def flipped(folder: Path, chance: Random, part: str) -> Story:
    """A flipped bit in what a killed run left: in "shared" or in the file of a rank, by its number."""

    def kill(life: Life, number: int) -> None:
        if number == 0:
            life.wait_for_step(chance.randint(9, 14))  # the queue, which ranks share, begins in epoch 1
            life.launched.send(signal.SIGKILL)

    def flip() -> None:
        name = f"checkpoint.step{saved_step(folder)}.rank{part}-of-{RANKS}.pth"
        flip_bit(folder / ("checkpoint.pth.tar" if part == "shared" else name), chance)

    return endure(folder, kill, between=flip)


def flip_bit(path: Path, chance: Random) -> None:
    """Change one bit of a tensor, in this file and not in others that are hard links to it."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename and entry.file_size]
    entry = chance.choice(tensors)
    lengths = (data[entry.header_offset + at] + 256 * data[entry.header_offset + at + 1] for at in (26, 28))
    begin = entry.header_offset + 30 + sum(lengths)
    data[begin + chance.randrange(entry.file_size)] ^= 1 << chance.randrange(8)
    path.unlink()
    path.write_bytes(data)


def stopped(folder: Path, chance: Random) -> Story:
    """SIGSTOP of a random rank: the watchdog of the other ends that one, and what starts ranks ends the stopped one."""

    def stop(life: Life, number: int) -> None:
        if number == 0:
            life.wait_for_step(chance.randint(2, 6))
            life.launched.send(signal.SIGSTOP, chance.randrange(RANKS))

    return endure(folder, stop, *HANG, patience_s=2.0)


def stuck(folder: Path, chance: Random) -> Story:
    """A random rank that never comes back from Python code in its step."""
    once = folder.with_name(folder.name + ".stuck")
    env = {"CHAOS_STUCK": f"{chance.randrange(RANKS)}:{chance.randint(2, 6)}:{once}"}
    return endure(folder, lambda life, number: None, *HANG, env=env)


def full_disk(folder: Path, chance: Random) -> Story:
    """A disk that others fill, and free after the run has ended; `folder` lies on the disk."""
    ballast = folder.with_name("ballast")

    def fill(life: Life, number: int) -> None:
        if number == 0:
            life.wait_for_step(chance.randint(2, 6))
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(1024)):
                    pass

    return endure(folder, fill, between=lambda: ballast.unlink(missing_ok=True))


def why_no_disk() -> str:
    """Why no disk can be made here; empty if one can."""
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True
    )
    return tried.stderr.strip()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_images(folder: Path) -> Path:
    """As many small images as the digits have."""
    folder.mkdir()
    for number in range(1000):
        noise = torch.randint(256, (20, 20, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{number:04}.bmp")
    return folder


def images_gone(folder: Path, chance: Random, images: Path, *, for_long: bool) -> Story:
    """The folder of images away for a second, or until the run has given up."""
    away = images.with_name("away")

    def take(life: Life, number: int) -> None:
        if number == 0:
            life.wait_for_step(chance.randint(2, 6))
            images.rename(away)
            if not for_long:
                time.sleep(1.0)
                away.rename(images)

    minutes = "0.05" if for_long else "1"
    flags = ("--data_path", str(images), "--data_patience_minutes", minutes)
    return endure(folder, take, *flags, between=lambda: away.rename(images))
