"""Clusters for tests: skipped visibly where none can be started, a failure in continuous integration."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.settings import Shape


@pytest.fixture(scope="session")
def start_cluster() -> Iterator[Callable[[Shape], Cluster]]:
    """Starts a cluster of the given shape, once per shape; all stop at the end."""
    reason = missing()
    if reason:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no Slurm cluster: {reason}")
    running: dict[Shape, Cluster] = {}
    with ExitStack() as stack:

        def start(shape: Shape) -> Cluster:
            if shape not in running:
                running[shape] = stack.enter_context(Cluster(shape))
            return running[shape]

        yield start


@pytest.fixture
def cluster(start_cluster: Callable[[Shape], Cluster]) -> Iterator[Cluster]:
    """Two idle nodes with 8 GPUs that look real to Slurm only; jobs and broken nodes are tidied up afterwards."""
    two = start_cluster(Shape())
    yield two
    two.tidy()
