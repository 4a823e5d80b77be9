"""Whatever happens to a run on one machine: it ends by itself, and the same command ends with the same bits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.chaos import faults
from tests.chaos.harness import Story, difference, whole_run

pytestmark = pytest.mark.slow

SEED = int.from_bytes(os.urandom(4), "big")


@pytest.fixture
def chance() -> Random:
    return Random(SEED)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed."""
    return whole_run(tmp_path_factory.mktemp("whole") / "run")


def assert_unharmed(story: Story, whole: Path, lost: int = 2) -> None:
    told = f"seed {SEED}: {story.codes}\n{story.printed[0]}"
    assert not story.orphans, told
    assert story.lost <= lost, told
    assert not difference(story.folder, whole), told


def test_killed(whole: Path, chance: Random, tmp_path: Path) -> None:
    story = faults.killed(tmp_path / "run", chance, kills=5)
    assert_unharmed(story, whole)
    assert story.restarts >= 5 and story.forced == 0, story.codes


@pytest.mark.parametrize("part", ["shared", "0", "1"])
def test_flipped_bit(part: str, whole: Path, chance: Random, tmp_path: Path) -> None:
    story = faults.flipped(tmp_path / "run", chance, part)
    assert_unharmed(story, whole)
    assert "falling back to checkpoint.previous.pth.tar" in story.printed[1]


def test_stopped_rank(whole: Path, chance: Random, tmp_path: Path) -> None:
    story = faults.stopped(tmp_path / "run", chance)
    assert_unharmed(story, whole)
    assert sorted(story.codes[0]) == [-9, 75] and "nothing has moved" in story.printed[0]


def test_stuck_rank(whole: Path, chance: Random, tmp_path: Path) -> None:
    story = faults.stuck(tmp_path / "run", chance)
    assert_unharmed(story, whole)
    assert 75 in story.codes[0] and story.forced == 0
    assert re.search(r"last at (step \d+ of 28|waiting for the checkpoint of step \d+); its threads", story.printed[0])
    assert "in wait_for_nothing" in story.printed[0], story.printed[0]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    reason = faults.why_no_disk()
    if reason:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no small disk: {reason}")
    with faults.small_disk(tmp_path / "disk") as folder:
        yield folder


def test_full_disk(whole: Path, chance: Random, disk: Path) -> None:
    story = faults.full_disk(disk / "run", chance)
    assert story.codes == [[2, 2], [0, 0]], story.printed[0]
    errors = [line for line in story.printed[0].splitlines() if "error" in line.lower()]
    assert len(set(errors)) == 1 and "No space left on device" in errors[0], story.printed[0]
    assert_unharmed(story, whole)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def whole_of_images(images: Path) -> Path:
    return whole_run(images.with_name("whole"), "--data_path", str(images))


@pytest.mark.parametrize("for_long", [False, True], ids=["for a second", "for long"])
def test_images_gone(for_long: bool, images: Path, whole_of_images: Path, chance: Random, tmp_path: Path) -> None:
    story = faults.images_gone(tmp_path / "run", chance, images, for_long=for_long)
    assert story.codes == ([[75, 75], [0, 0]] if for_long else [[0, 0]]), story.printed[0]
    assert "trying again in" in story.printed[0]
    assert_unharmed(story, whole_of_images)
