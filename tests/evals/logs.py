"""Scripts under test set up the package's logger; this puts it back for the tests that follow."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def restored_logger() -> Iterator[None]:
    """Handlers, level and propagation as they were."""
    package = logging.getLogger("clusterssl")
    before = list(package.handlers), package.level, package.propagate
    yield
    package.handlers[:], package.level, package.propagate = before
