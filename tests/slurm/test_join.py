"""Ranks find their place and one another in every way a job can start them, and say why when they cannot."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from clusterssl.rendezvous import expand
from tests.launch import ROOT
from tests.slurm.cluster import Cluster, until
from tests.slurm.jobs import TINY_JOB, log, submit
from tests.slurm.settings import Shape

PROBE = [sys.executable, "-u", str(ROOT / "tests" / "join_probe.py")]


def probes(shown: str) -> list[dict]:
    """What the ranks found, in their order."""
    found = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
    return sorted(found, key=lambda probe: probe["rank"])


def test_host_lists_are_read_as_slurm_reads_them(cluster: Cluster) -> None:
    for hosts in ("node[1-2]", "a[08-11,15],b", "r[1-2]n[09-10]", "x-1-[1-2,4]", "learnfair0001"):
        assert expand(hosts) == cluster.run("scontrol", "show", "hostnames", hosts).split()


@pytest.mark.slow
def test_padded_names_and_no_ipv4(start_cluster: Callable[[Shape], Cluster]) -> None:
    padded = start_cluster(Shape(name="gpu{:03}", ipv6=True))
    shown = padded.run("srun", "--nodes=2", "--ntasks-per-node=1", *PROBE, timeout=200)
    assert [(probe["host"], probe["sum"]) for probe in probes(shown)] == [("gpu001", 3), ("gpu002", 3)]
    assert "2 ranks on 2 nodes met at gpu001:" in shown


@pytest.mark.slow
def test_three_tasks_on_two_nodes_with_one_gpu_each(cluster: Cluster) -> None:
    shown = cluster.run("srun", "--nodes=2", "--ntasks=3", "--gpus-per-task=1", *PROBE, timeout=200)
    found = probes(shown)
    assert [(probe["rank"], probe["size"], probe["sum"], probe["launcher"]) for probe in found] == [
        (rank, 3, 6, "srun") for rank in range(3)
    ]
    assert sorted(probe["local"] for probe in found) == [0, 0, 1] and all(len(probe["gpus"]) == 1 for probe in found)
    assert "node1: 2 ranks on cpu" in shown and "node2: 1 rank on cpu" in shown


@pytest.mark.slow
def test_torchrun_inside_a_job(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "torchrun.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --output=job.log\nexport OMP_NUM_THREADS=1\n"
        f"srun {sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d "
        f"--rdzv-id=$SLURM_JOB_ID --rdzv-endpoint=node1:29500 {PROBE[-1]}\n"
    )
    job = cluster.submit(script, cwd=tmp_path)
    assert cluster.wait(job, timeout=300)["ExitCode"] == "0:0", log(tmp_path)
    found = probes(log(tmp_path))
    assert [(probe["size"], probe["sum"], probe["launcher"]) for probe in found] == [(2, 3, "torchrun")] * 2
    assert "(torchrun's agent)" in log(tmp_path)


@pytest.mark.slow
def test_shells_and_batch_scripts_are_no_ranks(cluster: Cluster, tmp_path: Path) -> None:
    shell = ["salloc", "--nodes=2", "--ntasks=4", "srun", "--interactive", "--preserve-env"]
    for command in (shell, ["salloc", "--nodes=2", "--ntasks=4"]):
        (found,) = probes(cluster.run(*command, *PROBE, timeout=100))
        assert (found["size"], found["launcher"]) == (1, "alone")
    job = cluster.submit("--nodes=2", "--ntasks=4", "--output=job.log", "--wrap", " ".join(PROBE), cwd=tmp_path)
    cluster.wait(job)
    assert probes(log(tmp_path))[0]["launcher"] == "alone"


@contextmanager
def mounted(cluster: Cluster, node: str, *words: str | Path) -> Iterator[None]:
    """Something else at a place of one node's file system."""
    cluster.on(node, "mount", *map(str, words))
    try:
        yield
    finally:
        cluster.on(node, "umount", str(words[-1]))


@pytest.mark.slow
def test_different_code_on_a_node(cluster: Cluster, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src")
    with (tmp_path / "src" / "clusterssl" / "optim.py").open("a") as file:
        file.write("# changed\n")
    with mounted(cluster, "node2", "--bind", tmp_path / "src", ROOT / "src"):
        shown = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", *PROBE, check=False, timeout=200)
    assert "exit code 2" in shown and " on node1; " in shown and " on node2); bring all nodes to the same" in shown


@pytest.mark.slow
def test_a_run_directory_that_is_not_shared(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with mounted(cluster, "node2", "-t", "tmpfs", "none", tmp_path / "run"):
        job = submit(cluster, tmp_path, *TINY_JOB)
        # each rank ends with 2, but srun may end the slower one first, and the job has the largest code
        assert cluster.wait(job)["ExitCode"] in ("2:0", "143:0"), log(tmp_path)
    assert f"--dump_path {tmp_path}/run: what node" in log(tmp_path) and "choose a folder that all" in log(tmp_path)
    assert not list((tmp_path / "run").glob(".nonce*"))


@pytest.mark.slow
def test_a_cut_link_is_told_on_both_sides(cluster: Cluster, tmp_path: Path) -> None:
    rank = f"PROBE_SECONDS=4 PROBE_AFTER=$SLURM_PROCID.here:cut exec {' '.join(PROBE)} 2> $SLURM_PROCID.err"
    (tmp_path / "rank.sh").write_text(f"{rank}\n")
    job = cluster.submit("--nodes=2", "--wrap", "srun --ntasks-per-node=1 sh rank.sh", cwd=tmp_path)
    until(lambda: len(list(tmp_path.glob("*.here"))) == 2, 100, "the tasks do not start")
    with cluster.cut("node2"):
        (tmp_path / "cut").touch()
        errors = [tmp_path / "0.err", tmp_path / "1.err"]
        until(lambda: all(path.exists() and "error" in path.read_text() for path in errors), 60, "nobody says anything")
        here, there = (path.read_text().splitlines()[-1] for path in errors)
    assert "rank 1 of 2 did not come to node1:" in here and "nobody came from node2; here are node1: rank 0" in here
    assert "rank 1 of 2 on node2 cannot join, rank 0 is missing: tried node1 (" in there
    cluster.run("scancel", job)


@pytest.mark.slow
def test_hosts_whose_name_leads_to_themselves(cluster: Cluster, tmp_path: Path) -> None:
    """As Debian's installer writes /etc/hosts."""
    with ExitStack() as stack:
        for node in cluster.nodes:
            hosts = tmp_path / node
            others = [line for line in (cluster.folder / "hosts").read_text().splitlines() if not line.endswith(node)]
            hosts.write_text("\n".join([f"127.0.1.1 {node}", *others]) + "\n")
            stack.enter_context(mounted(cluster, node, "--bind", hosts, "/etc/hosts"))
        shown = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", *PROBE, timeout=200)
    assert [probe["sum"] for probe in probes(shown)] == [3, 3]
