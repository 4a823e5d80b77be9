"""The test cluster is what it claims to be: separate nodes, real failures, real preemption, nothing left behind."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.settings import Shape

REACH_NODE2 = ("timeout", "2", "bash", "-c", "exec 3<>/dev/tcp/node2/6818")


def test_nodes_have_their_own_name_address_gpus_and_processes(cluster: Cluster) -> None:
    show = 'echo "$SLURM_PROCID $(hostname) $CUDA_VISIBLE_DEVICES $(hostname --ip-address)"; sleep 1'
    shown = cluster.run("srun", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1", "sh", "-c", show)
    rows = [line.split() for line in sorted(shown.splitlines())]
    assert [row[:3] for row in rows] == [
        ["0", "node1", "0"],
        ["1", "node1", "1"],
        ["2", "node2", "0"],
        ["3", "node2", "1"],
    ]
    assert len({row[3] for row in rows}) == 2
    assert "slurmctld" not in cluster.on("node1", "ps", "-e"), "a node sees its own processes only"


def test_a_failed_node_requeues_its_job_and_heals(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("--nodes=2", "--wrap", "sleep 100", cwd=tmp_path)
    cluster.wait(job, "RUNNING")
    cluster.fail("node2")
    cluster.wait(job, "PENDING")
    cluster.heal("node2")
    assert cluster.wait(job, "RUNNING")["Restarts"] == "1"


def test_a_cut_node_is_out_of_reach(cluster: Cluster) -> None:
    cluster.on("node1", *REACH_NODE2)
    with cluster.cut("node2"), pytest.raises(AssertionError, match="ended with"):
        cluster.on("node1", *REACH_NODE2)
    cluster.on("node1", *REACH_NODE2)


def test_an_urgent_job_preempts(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\n#SBATCH --exclusive --requeue\ntrap 'exit 0' TERM\nsleep 100 & wait\n")
    job = cluster.submit("--nodes=2", script, cwd=tmp_path)
    cluster.wait(job, "RUNNING")
    urgent = cluster.submit("--nodes=2", "--exclusive", "--partition=urgent", "--wrap", "true", cwd=tmp_path)
    assert cluster.wait(job, "PENDING")["Restarts"] == "1"
    assert cluster.wait(urgent)["ExitCode"] == "0:0"


def test_nothing_is_left_of_a_stopped_cluster(start_cluster: object) -> None:
    with Cluster(Shape(nodes=1)) as cluster:
        assert cluster.run("srun", "hostname").strip() == "node1"
    listed = subprocess.run(["ps", "-eo", "state,args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in listed.splitlines() if str(cluster.folder) in line and not line.startswith("Z")]
    for things in (["link"], ["netns"]):
        shown = subprocess.run(["ip", *things], capture_output=True, text=True, check=True, env=cluster.env).stdout
        assert f"tc{cluster.subnet}n" not in shown
