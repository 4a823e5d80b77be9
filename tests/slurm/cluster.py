"""A real Slurm cluster of several nodes on one machine, started and broken by tests.

Every node has namespaces of its own for network, mounts, host name and processes: `gethostname()` differs, 127.0.0.1
of a node is not that of another, and killing a node's first process ends all that runs on it, as a power cut would.
All processes end with the one that started the cluster, however that one ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from tests.slurm.settings import Shape, write_settings

SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare", "setpriv")
ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip

NODE = """
hostname "$1" && mount --bind "$2/hosts" /etc/hosts || exit 1
slurmd -D -N "$1" -f "$2/slurm.conf" &
wait $!
"""
"""The shell stays as the node's first process, because that one has to collect orphans."""


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge iproute2 procps util-linux"
    if os.geteuid():
        return "only root may make the namespaces of a cluster"
    trial = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True)
    return f"no namespaces here: {trial.stderr.decode().strip()}" if trial.returncode else ""


class Cluster:
    """One cluster, running inside a `with` block."""

    def __init__(self, shape: Shape | None = None) -> None:
        """Reserve a number and a folder for the daemons' files; nothing is started before the `with` block."""
        self.shape = shape or Shape()
        self.nodes = self.shape.names()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.subnet, self.folder, self._lock = _reserve()
        self.env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.env["PATH"] = os.pathsep.join([str(self.folder / "bin"), SYSTEM_PATH])

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _start(self) -> None:
        self._sweep()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o755)
        write_settings(self.folder, self.shape, self.subnet)
        munge = self.folder / "munge"
        self._daemon(
            "munged", "munged", "--foreground", f"--key-file={munge}/key", f"--socket={munge}/socket",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        self._ip("link", "add", self._link(0), "type", "bridge")
        self._address([], self._link(0), 0)
        for number in range(1, len(self.nodes) + 1):
            self._connect(number)
        until(lambda: (munge / "socket").exists(), 20, "munged does not answer")
        self._daemon("slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))
        for node in self.nodes:
            self.heal(node)
        until(self._all_idle, 30, lambda: f"the nodes are not idle:\n{self.run('sinfo', '-N', '-l', check=False)}")

    def _sweep(self) -> None:
        """Remove what the last user of the number left behind; its processes ended with it."""
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, env=self.env).stdout
        for name in (line.split()[0] for line in listed.splitlines()):
            if name.startswith(f"tc{self.subnet}n"):
                self._ip("netns", "del", name, check=False)
        self._ip("link", "del", self._link(0), check=False)

    def _link(self, number: int) -> str:
        return f"tc{self.subnet}n{number}"

    def _connect(self, number: int) -> None:
        """Give a node its network: a cable into the bridge."""
        link = self._link(number)
        inside = ["-n", link]
        self._ip("netns", "add", link)
        self._ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", link)
        self._ip("link", "set", link, "master", self._link(0), "up")
        self._ip(*inside, "link", "set", "lo", "up")
        self._address(inside, "eth0", number)

    def _address(self, inside: list[str], device: str, number: int) -> None:
        suffix = ["64", "nodad"] if self.shape.ipv6 else ["24"]
        address = f"{self.shape.address(self.subnet, number)}/{suffix[0]}"
        self._ip(*inside, "addr", "add", address, "dev", device, *suffix[1:])
        self._ip(*inside, "link", "set", device, "up")

    def _ip(self, *words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=True, env=self.env)

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                env=self.env, cwd=self.folder,
            )  # fmt: skip

    def _all_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "-N", "-p", "urgent", "-o", "%T", check=False).split()
        return states == ["idle"] * len(self.nodes)

    def tidy(self) -> None:
        """Cancel all jobs and heal all nodes."""
        for node in set(self.nodes) - set(self._daemons):
            self.heal(node)
        self.run("scancel", f"--user={os.geteuid()}")
        until(self._all_idle, 60, lambda: f"the nodes are not idle:\n{self.run('squeue', check=False)}")

    def stop(self) -> None:
        """End everything; nothing is left but the files, until the number is used again."""
        for daemon in self._daemons.values():
            daemon.kill()
        for daemon in self._daemons.values():
            daemon.wait()
        self._daemons.clear()
        if not self._lock.closed:
            self._sweep()
            self._lock.close()

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, timeout: float = 60) -> str:
        """Standard output of a command on the login node, with its errors below when it may fail."""
        done = subprocess.run(command, capture_output=True, text=True, env=self.env, cwd=cwd, timeout=timeout)
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout if check else done.stdout + done.stderr

    def on(self, node: str, *command: str) -> str:
        """Run a command on a node, outside of Slurm."""
        first = self._first_process(node)
        inside = ["nsenter", f"--target={first}", "--net", "--mount", "--uts", "--pid"]
        return self.run(*inside, *command)

    def _first_process(self, node: str) -> int:
        parent = self._daemons[node].pid
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])

    def submit(self, *words: str | Path, cwd: Path) -> str:
        """Number of the job that `sbatch WORDS` starts from folder `cwd`."""
        return self.run("sbatch", "--parsable", *map(str, words), cwd=cwd).strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(word.partition("=")[::2] for word in shown.split() if "=" in word)

    def wait(self, number: str, *states: str, timeout: float = 300) -> dict[str, str]:
        """The job as soon as it is in one of these states; without any, as soon as it has ended."""
        wanted = set(states) or ENDED
        until(
            lambda: self.job(number)["JobState"] in wanted, timeout,
            lambda: f"job {number} is not {' or '.join(sorted(wanted))} but {self.job(number)}",
        )  # fmt: skip
        return self.job(number)

    def fail(self, node: str, *, told: bool = True) -> None:
        """Cut a node's power; Slurm finds out by itself after some 25 seconds unless it is told."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        if told:
            self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def heal(self, node: str) -> None:
        """Start a node (again)."""
        link = self._link(self.nodes.index(node) + 1)
        self._daemon(
            node, "nsenter", f"--net=/run/netns/{link}", "unshare", "--mount", "--uts", "--pid", "--fork",
            "--kill-child", "--mount-proc", "bash", "-c", NODE, "node", node, str(self.folder),
        )  # fmt: skip

    @contextlib.contextmanager
    def cut(self, node: str) -> Iterator[None]:
        """Pull a node's network cable for the duration of a block."""
        link = self._link(self.nodes.index(node) + 1)
        self._ip("link", "set", link, "down")
        try:
            yield
        finally:
            self._ip("link", "set", link, "up")


def until(holds: Callable[[], bool], timeout: float, otherwise: str | Callable[[], str]) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: it does not within `timeout` seconds; `otherwise` says what is wrong.
    """
    end = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > end:
            raise AssertionError(f"after {timeout:.0f} s: {otherwise if isinstance(otherwise, str) else otherwise()}")
        time.sleep(0.1)


def _reserve() -> tuple[int, Path, IO[bytes]]:
    """A number that no other cluster uses, its folder, and the lock that says so until this process ends."""
    place = Path(tempfile.gettempdir())  # short, and open to all users, both of which munged insists on
    for number in range(1, 250):
        lock = (place / f"test-cluster-{number}.lock").open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        return number, place / f"test-cluster-{number}", lock
    raise RuntimeError("249 clusters are running already")
