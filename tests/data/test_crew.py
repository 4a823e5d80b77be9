"""Processes that pack: they end with the command, whoever ends that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from clusterssl.data.crew import done_by
from clusterssl.errors import UserError
from tests.launch import ROOT, Launched


def images_that_block(folder: Path, blocked: int) -> Path:
    """A list of one picture and some pipes that nobody writes to: whoever reads one waits for ever."""
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    for i in range(blocked):
        os.mkfifo(folder / f"pipe{i}.png")
    listed = folder / "list.txt"
    listed.write_text("0.png\n" + "".join(f"pipe{i}.png\n" for i in range(blocked)))
    return listed


def wait_for(path: Path) -> None:
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def packing(listed: Path, target: Path) -> subprocess.Popen[str]:
    words = ["-m", "clusterssl.data.pack", str(listed), str(target), "--shard_images", "1", "--workers", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    out = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *words], env=env, stdout=out, stderr=out, text=True, start_new_session=True
    )


def anyone_left(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_no_process_outlives_a_command_that_is_killed_or_stopped(tmp_path: Path) -> None:
    """Both processes of each are stuck in an image: the end must not wait for theirs."""
    ends = (signal.SIGKILL, signal.SIGTERM)
    listed = images_that_block(tmp_path / "images", 2)
    commands = [packing(listed, tmp_path / number.name) for number in ends]
    try:
        for number, command in zip(ends, commands, strict=True):
            wait_for(tmp_path / number.name / "000000.tar.json")
            command.send_signal(number)
            said = command.communicate(timeout=60)[1]  # ends when nobody holds its output open
            assert command.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 75)
            assert "Traceback" not in said
            if number == signal.SIGTERM:
                assert said.splitlines()[-1].startswith("pack.py: stopped by SIGTERM; whole shards stay"), said
            end = time.monotonic() + 30
            while anyone_left(command.pid) and time.monotonic() < end:
                time.sleep(0.05)
            assert not anyone_left(command.pid)
            assert (tmp_path / number.name / "000000.tar").is_file()
    finally:
        for command in commands:
            if anyone_left(command.pid):
                os.killpg(command.pid, signal.SIGKILL)
            command.wait()


@pytest.mark.parametrize(
    ("number", "code", "told"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGUSR1, 75, "stop")]
)
def test_one_process_stops_between_two_images(tmp_path: Path, number: signal.Signals, code: int, told: str) -> None:
    listed, target = images_that_block(tmp_path / "images", 1), tmp_path / "packed"
    launched = Launched(
        "src/clusterssl/data/pack.py", str(listed), str(target), "--shard_images", "1", "--workers", "1"
    )
    wait_for(target / "000000.tar.json")
    time.sleep(0.2)
    launched.send(number)
    if number != signal.SIGINT:
        (tmp_path / "images" / "pipe0.png").write_bytes(b"an image")  # what it reads ends; it goes no further
    codes, printed = launched.wait(60)
    assert codes == [code] and told in printed.splitlines()[-1] and "Traceback" not in printed


def unlucky(number: int) -> int:
    if number == 1:
        raise UserError("number 1: is no good")
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_what_a_process_says_or_dies_of_is_one_line() -> None:
    with pytest.raises(UserError, match="number 1: is no good"):
        list(done_by(2, unlucky, [0, 1]))
    with pytest.raises(UserError, match="was killed, maybe for its memory"):
        list(done_by(2, unlucky, [0, 2]))
