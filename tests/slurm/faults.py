"""The faults of a cluster: each function lets one happen to a running job and returns when Slurm has taken it back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.chaos.harness import Story, last_step, saved_step
from tests.slurm.cluster import Cluster, until
from tests.slurm.jobs import TINY_JOB, go_on, log, ranks_on, submit

Fault = Callable[[Cluster, str, Path], None]


def urgent_job(cluster: Cluster, job: str, folder: Path) -> None:
    """Another one takes the nodes."""
    urgent = cluster.submit("--nodes=2", "--exclusive", "--partition=urgent", "--wrap", "true", cwd=folder)
    cluster.wait(job, "PENDING")
    assert "stopped by SIGUSR1" in log(folder)
    cluster.wait(urgent, "COMPLETED")


def failed_node(cluster: Cluster, job: str, folder: Path) -> None:
    """A node loses power; it is healed when the job waits."""
    cluster.fail("node2")
    cluster.wait(job, "PENDING")
    cluster.heal("node2")


def cut_link(cluster: Cluster, job: str, folder: Path) -> None:
    """A node is out of reach, its processes go on; Slurm finds out by itself."""
    with cluster.cut("node2"):
        cluster.wait(job, "PENDING", timeout=90)


def stopped_rank(cluster: Cluster, job: str, folder: Path) -> None:
    """A rank is stopped and says nothing more; the watchdog of the other asks for the requeue."""
    cluster.on("node2", "kill", "-STOP", *ranks_on(cluster, "node2"))
    cluster.wait(job, "PENDING", timeout=90)
    assert "nothing has moved for" in log(folder) and "of 120; its threads" in log(folder)


def endure_as_job(cluster: Cluster, folder: Path, *faults: Fault) -> Story:
    """A job that meets some faults, one after another, and is requeued after each."""
    minutes = "0.15" if stopped_rank in faults else "20"
    job = submit(cluster, folder, *TINY_JOB, "--hang_minutes", minutes, options=("--exclusive",))
    story = Story(folder / "run")
    for number, fault in enumerate(faults, start=1):
        go_on(folder)
        fault(cluster, job, folder)
        story.lost = max(story.lost, last_step(story.folder) - saved_step(story.folder))
        story.codes.append([])
        cluster.wait(job, "RUNNING", "COMPLETED")
        assert cluster.job(job)["Restarts"] == str(number), log(folder)
    ended = cluster.wait(job)
    story.codes.append([int(ended["ExitCode"].split(":")[0])])
    story.printed.append(log(folder))
    story.orphans = [f"{node}: {rank}" for node in cluster.nodes for rank in left_on(cluster, node)]
    return story


def left_on(cluster: Cluster, node: str) -> list[str]:
    """Ranks that are on a node some seconds after their job has ended."""
    try:
        until(lambda: not ranks_on(cluster, node), 15, "")
    except AssertionError:
        return ranks_on(cluster, node)
    return []
