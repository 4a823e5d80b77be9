"""Lines about how far a long pass is."""

from __future__ import annotations

import logging

import pytest

from clusterssl.evals import pace


def test_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = iter([0.0, 6.0, 12.0, 18.0, 24.0])
    monkeypatch.setattr(pace.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO):
        assert list(pace.paced("abcd", 15, "testing", 4)) == list("abcd")
    assert caplog.messages == ["testing: 8 of 15 images, 0.7 images/s", "testing: 15 of 15 images, 0.6 images/s"]
