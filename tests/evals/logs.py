"""What evaluations leave behind: their records; and the package's logger, put back for the tests that follow."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def restored_logger() -> Iterator[None]:
    """Handlers, level and propagation as they were."""
    package = logging.getLogger("clusterssl")
    before = list(package.handlers), package.level, package.propagate
    yield
    package.handlers[:], package.level, package.propagate = before


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of evaluations.jsonl."""
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
