"""What all tests share."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Iterator

import pytest
import torch

if os.environ.get("CI"):  # nothing may be absent there: what would be skipped fails
    pytest.importorskip = importlib.import_module  # type: ignore[assignment]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell, and scripts would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def needs_a_gpu(request: pytest.FixtureRequest) -> None:
    """Tests marked so are skipped, visibly, where there is none."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU here")


@pytest.fixture(autouse=True)
def own_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts called in this process read a command line that ends with the test."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """A training that was stopped in this process leaves it deaf to signals, as it is meant to, until the test ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
