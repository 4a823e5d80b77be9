"""Real processes join, or say in one line why they cannot."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clusterssl.rollcall import absent, differences, examine, mapping
from tests.launch import ROOT

RECORD = {"host": "node1", "pid": 1, "device": "cpu", "gpu": "", "uuid": "", "code": "aa", "versions": {"torch": "2.6"}}
GPU = {"gpu": "NVIDIA H200"}


def records(*changes: dict) -> list[dict]:
    return [{**RECORD, "rank": rank, **change} for rank, change in enumerate(changes)]


def test_examine() -> None:
    two = {"host": "node2"}
    assert examine(records({}, two)) == ""
    assert "different code on the ranks (aa on node1; bb on node2)" in examine(records({}, {**two, "code": "bb"}))
    assert "cuda on node1; cpu on node2" in examine(records({"device": "cuda:0"}, two))
    same = {"device": "cuda:0", "uuid": "GPU-1"}
    assert examine(records(same, {**same, **two})) == "", "another host's GPU of the same name"
    assert "ranks 1-2 share one GPU of node1" in examine(records({**same, "uuid": "x"}, same, same))


def test_differences_and_absent() -> None:
    here = records({}, {"host": "node2", "versions": {"torch": "2.7"}})
    assert differences(here) == ["torch differs between the nodes (2.6 on node1; 2.7 on node2)"]
    line = absent(here, 6, ["node1", "node2", "node3"], "node1:99")
    assert line.startswith("ranks 2-5 of 6 did not come to node1:99 in time; nobody came from node3; here are node1: ")


def test_mapping_names_nodes_that_are_alike_once() -> None:
    nodes = [{"host": f"n{node}", "device": f"cuda:{gpu}", **GPU} for node in range(3) for gpu in range(2)]
    lines = mapping(records(*nodes, {"host": "n3", "device": "cuda:0", **GPU}), "n0:99")
    assert lines == [
        "7 ranks on 4 nodes met at n0:99; they exchange tensors by NCCL, CPU tensors by gloo",
        "n0, n1, n2: 2 ranks on cuda:0, cuda:1 (NVIDIA H200)",
        "n3: 1 rank on cuda:0 (NVIDIA H200)",
    ]


class Probes:
    """Ranks of tests/join_probe.py, each with its own variables."""

    def __init__(self, size: int, started: dict[int, dict[str, str]]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.began = time.monotonic()
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(self.port)}
        command = [sys.executable, str(ROOT / "tests" / "join_probe.py")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **common}
        self.processes = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank), **env}, **pipes)
            for rank, env in started.items()
        ]

    def ended(self) -> tuple[list[int], list[str], list[str]]:
        """Exit codes, standard outputs and standard errors."""
        both = [process.communicate(timeout=200) for process in self.processes]
        return [process.returncode for process in self.processes], [out for out, _ in both], [err for _, err in both]


def test_versions_that_differ_are_named(tmp_path: Path) -> None:
    other = tmp_path / "submitit-0.0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: submitit\nVersion: 0.0.1\n")
    codes, outs, errs = Probes(2, {0: {}, 1: {"PYTHONPATH": str(tmp_path)}}).ended()
    assert codes == [0, 0], errs
    assert [json.loads(out.splitlines()[-1])["sum"] for out in outs] == [3, 3]
    assert outs[0].count("2 ranks on 1 nodes met at localhost:") == 1 and "gloo" in outs[0]
    assert "warning: submitit differs between the nodes (" in outs[0] and "0.0.1 on" in outs[0]


@pytest.mark.parametrize("what", ["missing", "code"])
def test_refused_in_one_line_by_all(what: str, tmp_path: Path) -> None:
    if what == "missing":
        probes = Probes(3, {rank: {"PROBE_SECONDS": "6"} for rank in (0, 1)})
        expected = f"rank 2 of 3 did not come to localhost:{probes.port} in time"
    else:
        shutil.copytree(ROOT / "src", tmp_path / "src")
        (tmp_path / "src" / "clusterssl" / "optim.py").open("a").write("# changed\n")
        probes = Probes(2, {0: {}, 1: {"PROBE_SOURCE": str(tmp_path / "src")}})
        expected = "different code on the ranks ("
    codes, _, errs = probes.ended()
    assert codes == [2, 2], errs
    for err in errs:
        assert len(err.strip().splitlines()) == 1 and err.startswith("join_probe.py: error: ") and expected in err


def test_a_rank_that_dies_after_the_roll_is_not_waited_for() -> None:
    codes, _, errs = Probes(2, {0: {"PROBE_SECONDS": "6"}, 1: {"PROBE_DIES": "1"}}).ended()
    assert codes == [2, 0], errs
    assert "rank 0 of 2 on" in errs[0] and "could not join the others" in errs[0]
