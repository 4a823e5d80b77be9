"""What was said before the run directory was open stands in its log, too."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusterssl.dist import World
from clusterssl.log import log_to_file, log_to_screen

package = logging.getLogger("clusterssl")


@pytest.fixture(autouse=True)
def logger_as_before() -> Iterator[None]:
    before = list(package.handlers), package.level, package.propagate
    yield
    package.handlers[:], package.level, package.propagate = before


def test_the_log_begins_with_what_the_screen_showed_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(notes=((logging.WARNING, "clocks differ"),))
    log_to_screen(world)
    package.info("memory: 3 MB")
    log_to_file(tmp_path / "train.log", world)
    package.info("step 1")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["clocks differ", "memory: 3 MB", "step 1"]
    assert capsys.readouterr().out.splitlines() == ["clocks differ", "memory: 3 MB", "step 1"]


def test_other_ranks_write_no_file(tmp_path: Path) -> None:
    log_to_screen(World(1, 2))
    log_to_file(tmp_path / "train.log", World(1, 2))
    assert not (tmp_path / "train.log").exists()
