"""Ranks find one another: places, short host lists, taken ports, other programs behind them."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta

import pytest

from clusterssl import rendezvous
from clusterssl.errors import UserError
from clusterssl.rendezvous import Place, expand, find_place, meeting_point

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
JOB = {"SLURM_JOB_ID": "123456", "SLURM_NTASKS": "20", "SLURM_TASKS_PER_NODE": "10(x2)", "SLURM_PROCID": "0"}
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "20", "SLURM_PROCID": "13", "SLURM_LOCALID": "3"}
SHELL = {**JOB, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, (0, 1, 0, "alone")),
        (TORCHRUN, (5, 8, 1, "torchrun")),
        (STEP, (13, 20, 3, "srun")),
        ({**STEP, **TORCHRUN}, (5, 8, 1, "torchrun")),
        (JOB, (0, 1, 0, "alone")),
        (SHELL, (0, 1, 0, "alone")),
    ],
    ids=["alone", "torchrun", "srun", "torchrun inside srun", "batch script without srun", "shell of salloc"],
)
def test_place(env: dict[str, str], expected: tuple) -> None:
    assert dataclasses.astuple(find_place(env)) == expected


@pytest.mark.parametrize(
    ("env", "message"),
    [({"RANK": "two", "WORLD_SIZE": "4"}, "RANK=two"), ({"RANK": "4", "WORLD_SIZE": "4"}, "from 0 to 3")],
)
def test_variables_that_make_no_place(env: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_place(env)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("node1", ["node1"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("gpu[008-010,12],login", ["gpu008", "gpu009", "gpu010", "gpu12", "login"]),
        ("learnfair0001", ["learnfair0001"]),
        ("r[1-2]n[09-10].local", ["r1n09.local", "r1n10.local", "r2n09.local", "r2n10.local"]),
        ("", []),
    ],
)
def test_short_host_lists(hosts: str, expected: list[str]) -> None:
    assert expand(hosts) == expected


def test_meeting_points() -> None:
    step = {**STEP, "SLURM_JOB_NODELIST": "gpu[08-09]"}
    host, port = meeting_point(find_place(step), "env://", step) or ("", 0)
    assert host == "gpu08" and 10000 <= port < 30000
    for change in ({"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "123457"}):
        assert meeting_point(find_place(step), "env://", {**step, **change}) not in (None, (host, port))
    named = {**TORCHRUN, "MASTER_ADDR": "fd00::1", "MASTER_PORT": "1234"}
    assert meeting_point(find_place(named), "env://", named) == ("fd00::1", 1234)
    assert meeting_point(Place(), "tcp://[fd00::1]:99", {}) == ("fd00::1", 99)
    assert meeting_point(Place(), "env://", {**named, "TORCHELASTIC_USE_AGENT_STORE": "True"}) is None
    for url, env in (("env://", TORCHRUN), ("tcp://host", {}), ("env://", {**named, "MASTER_PORT": "x"})):
        with pytest.raises(UserError):
            meeting_point(find_place(env), url, env)


@pytest.fixture
def taken() -> Iterator[list[int]]:
    """Consecutive ports, all free but for the first, at which somebody listens who never says a word."""
    with ExitStack() as stack:
        while True:
            first = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            try:
                for port in range(first + 1, first + rendezvous.CANDIDATES):
                    socket.create_server(("127.0.0.1", port)).close()
            except (OSError, OverflowError):
                continue
            yield list(range(first, first + rendezvous.CANDIDATES))
            return


def test_all_ranks_pass_over_a_taken_port_and_another_run(taken: list[int]) -> None:
    theirs = rendezvous._receive("localhost", taken, "their word", timedelta(seconds=20))
    ours = rendezvous._receive("localhost", taken, "our word", timedelta(seconds=20))
    try:
        assert (theirs.where, ours.where) == (f"localhost:{taken[1]}", f"localhost:{taken[2]}")
        port, number = rendezvous._find(Place(1, 2), "localhost", taken, "our word", time.monotonic() + 30)
        assert (port, number) == (taken[2], ours.store.port)
    finally:
        theirs.close()
        ours.close()


def test_a_rank_that_finds_nobody_says_what_it_tried(taken: list[int]) -> None:
    began = time.monotonic()
    with pytest.raises(UserError) as refused:
        rendezvous._find(Place(3, 4), "127.0.0.1", taken, "our word", began + 5)
    assert time.monotonic() - began < 10
    assert "rank 3 of 4" in str(refused.value) and "rank 0 is missing: tried 127.0.0.1" in str(refused.value)
    assert f"no answer at port {taken[0]}" in str(refused.value)
    assert f"connection refused at ports {taken[1]} to {taken[-1]}" in str(refused.value)


def test_no_port_is_free(taken: list[int]) -> None:
    with pytest.raises(UserError, match=f"no free port.*from {taken[0]} to {taken[0]}.*set MASTER_PORT"):
        rendezvous._bind(taken[:1])
