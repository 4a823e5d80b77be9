"""A rank that hangs says where, and the run ends by itself."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from PIL import Image

from clusterssl import pulse
from clusterssl.watchdog import watching
from tests.launch import TINY, Launched


def test_a_moving_process_is_left_alone() -> None:
    with watching(0.3 / 60, 0):
        for _ in range(6):
            time.sleep(0.1)
            pulse.beat("a step")
    time.sleep(0.5)  # nor is one that has left


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_hanging_rank_names_step_and_stack(ranks: int, tmp_path: Path) -> None:
    for number in range(95):
        Image.new("RGB", (24, 24), (number, 0, 0)).save(tmp_path / f"{number:02}.png")
    os.mkfifo(tmp_path / "95.png")  # whoever opens it waits for a writer
    listed = tmp_path / "images.txt"
    listed.write_text("".join(f"{tmp_path / f'{number:02}.png'}\n" for number in range(96)))
    words = [*TINY, "--data_path", str(listed), "--dump_path", str(tmp_path / "run"), "--hang_minutes", "0.1"]
    words += ["--batch_size", str(16 // ranks)]
    codes, printed = Launched("main_swav.py", *words, ranks=ranks).wait(timeout=60)
    assert 75 in codes and 0 not in codes, printed
    assert "nothing has moved for" in printed and "--hang_minutes 0.1" in printed and "of 24; its threads" in printed
    assert "dataset.py" in printed  # the stack of the rank that opens the file
