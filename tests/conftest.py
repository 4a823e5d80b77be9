"""What all tests share."""

from __future__ import annotations

import importlib
import os
import sys

import pytest

if os.environ.get("CI"):  # nothing may be absent there: what would be skipped fails
    pytest.importorskip = importlib.import_module  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def own_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts called in this process read a command line that ends with the test."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
