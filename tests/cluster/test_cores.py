from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from clusterssl.cluster.cores import on_cores


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_shares_cover_the_rows_once_each_in_a_thread_of_one_core() -> None:
    meeting = threading.Barrier(3, timeout=60)  # only met when all three run at once

    def work(start: int, stop: int) -> tuple[list[int], int]:
        meeting.wait()
        return list(range(start, stop)), torch.get_num_threads()

    found = on_cores(work, 10)
    assert [row for rows, _ in found for row in rows] == list(range(10))
    assert [threads for _, threads in found] == [1, 1, 1] and torch.get_num_threads() == 3
    assert [rows for rows, _ in on_cores(work, 3)] == [[0], [1], [2]]


@pytest.mark.usefixtures("three_threads")
def test_an_error_of_one_share_arrives_and_the_threads_are_given_back() -> None:
    def work(start: int, stop: int) -> None:
        if start > 0:
            raise ValueError("bad share")

    with pytest.raises(ValueError, match="bad share"):
        on_cores(work, 10)
    assert torch.get_num_threads() == 3


def test_no_rows_are_one_share() -> None:
    assert on_cores(lambda start, stop: (start, stop), 0) == [(0, 0)]
