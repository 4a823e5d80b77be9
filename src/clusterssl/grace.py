"""Whether a checkpoint can be written in the time that a Slurm job has between the request to stop and its end."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from dataclasses import dataclass

from clusterssl.preemption import job_number, scontrol

logger = logging.getLogger(__name__)

_SIGNAL = re.compile(r"--signal[= ][\"']?(?:[BR]+:)?\w+(?:@(\d+))?")
_DEFAULT_SIGNAL_S = 60
"""of a --signal that names no time"""


@dataclass(frozen=True)
class Grace:
    """Seconds, and what grants them."""

    seconds: float
    giver: str

    def fits(self, save_s: float) -> bool:
        """Whether a stop has time for a save of so many seconds, and first for one that is under way."""
        return 2 * save_s <= self.seconds

    def tell(self, save_s: float) -> None:
        """Log whether a save of so many seconds fits."""
        text = f"a save takes {save_s:.1f} s, {self.giver} leaves {self.seconds:.0f} s"
        if self.fits(save_s):
            logger.info("%s", text)
            return
        logger.warning(
            "%s: too little where a stop meets a save under way; what came after the last whole checkpoint would be "
            "lost. Ask sbatch for --signal=USR1@%.0f, or for a longer GraceTime, or choose a faster --dump_path",
            text, 4 * save_s + 30,
        )  # fmt: skip


def read_grace() -> Grace | None:
    """The shortest time that this job may be left; None outside a Slurm job, or where Slurm does not tell.

    That of `--signal`, as the line that submitted the job or the batch script says, else the KillWait between SIGTERM
    and SIGKILL; and what the partition leaves a preempted job.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return None
    try:
        job = scontrol("--oneliner", "show", "job", job_number())
        partition = re.search(r" Partition=([^\s,]+)", job)
        about = scontrol("--oneliner", "show", "partition", partition.group(1)) if partition else ""
        return shortest(job, _script(), about, scontrol("show", "config"))
    except (OSError, subprocess.SubprocessError):
        return None


def _script() -> str:
    try:
        return scontrol("write", "batch_script", job_number(), "-")
    except (OSError, subprocess.SubprocessError):  # an interactive job has none
        return ""


def shortest(job: str, script: str, partition: str, config: str) -> Grace | None:
    """As `read_grace`, from what scontrol shows of job and partition, of the batch script, and of the configuration."""
    directives = "\n".join(line for line in script.splitlines() if line.startswith("#SBATCH"))
    found = []
    signal = _SIGNAL.search(job) or _SIGNAL.search(directives)
    wait = re.search(r"^KillWait\s*=\s*(\d+)", config, re.MULTILINE)
    if signal:
        found.append(Grace(float(signal.group(1) or _DEFAULT_SIGNAL_S), "your signal"))
    elif wait:
        found.append(Grace(float(wait.group(1)), "Slurm's KillWait, without --signal,"))
    given = re.search(r" GraceTime=(\d+)", partition)
    if given and int(given.group(1)) and not re.search(r" PreemptMode=OFF\b", partition):
        found.append(Grace(float(given.group(1)) + (float(wait.group(1)) if wait else 0.0), "a preemption"))
    return min(found, key=lambda one: one.seconds, default=None)
