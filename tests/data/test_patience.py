"""Images that go away for a while, and for good."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from clusterssl.data.decode import BadImageError, decode_file
from clusterssl.data.patience import load_patiently
from clusterssl.errors import DataGone
from clusterssl.files import read_checkpoint
from tests.launch import TINY, Launched, wait_for_step


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(96):
        Image.new("RGB", (24, 24), (number, 2 * number, 255 - number)).save(folder / f"{number:02}.png")
    return folder


def test_waits_for_a_folder_that_comes_back(images: Path) -> None:
    away = images.with_name("away")
    images.rename(away)
    threading.Timer(0.7, lambda: away.rename(images)).start()
    image = load_patiently(lambda: decode_file(images / "05.png"), str(images), 20.0)
    assert image[:, 0, 0].tolist() == [5, 10, 250]


def test_a_missing_file_in_a_folder_that_is_there_is_a_bad_image(images: Path) -> None:
    for folder in (str(images), ""):
        with pytest.raises(BadImageError, match="No such file"):
            load_patiently(lambda: decode_file(images / "none.png"), folder, 20.0)


def test_a_stale_handle_is_waited_for() -> None:
    tries = 0

    def load() -> torch.Tensor:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise BadImageError("cannot be read") from OSError(errno.ESTALE, "Stale file handle")
        return torch.zeros(3, 1, 1)

    assert load_patiently(load, "", 20.0).shape == (3, 1, 1) and tries == 2


def test_patience_ends(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(DataGone, match="out of reach for 1 s"):
        load_patiently(lambda: decode_file(tmp_path / "gone" / "1.png"), str(tmp_path / "gone"), 1.0)
    assert time.monotonic() - began >= 1.0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_survives_and_gives_up_with_75(ranks: int, images: Path, tmp_path: Path) -> None:
    words = [*TINY, "--data_path", str(images), "--batch_size", str(16 // ranks), "--checkpoint_minutes", "0"]
    words += ["--data_patience_minutes", "0.05", "--dump_path", str(tmp_path / "run")]
    launched, away = Launched("main_swav.py", *words, ranks=ranks), tmp_path / "away"
    wait_for_step(tmp_path / "run", 2, launched)
    images.rename(away)
    codes, printed = launched.wait()
    assert codes == [75] * ranks, printed
    assert "trying again in" in printed and "the same command goes on" in printed
    away.rename(images)
    codes, printed = Launched("main_swav.py", *words, ranks=ranks).wait()
    assert codes == [0] * ranks, printed
    whole = [*words[:-1], str(tmp_path / "whole")]
    assert Launched("main_swav.py", *whole, ranks=ranks).wait()[0] == [0] * ranks
    ended, expected = (
        read_checkpoint(tmp_path / name / "checkpoint.pth.tar")["state_dict"] for name in ("run", "whole")
    )
    assert all(torch.equal(ended[name], expected[name]) for name in expected)
