"""The time a Slurm job has to save, read from what Slurm shows (records of Slurm 22.05)."""

from __future__ import annotations

import logging

import pytest

from clusterssl.grace import Grace, shortest

JOB = "JobId=2 JobName=a.sh UserId=u(1) BatchFlag=1 TimeLimit=01:00:00 Partition=main AllocNode:Sid=login:27656"
PARTITION = "PartitionName=main DisableRootJobs=NO ExclusiveUser=NO GraceTime={} Hidden=NO PreemptMode={} State=UP"
CONFIG = "KillOnBadExit           = 0\nKillWait                = 30 sec\nLaunchParameters        = (null)\n"
SCRIPT = "#!/bin/bash\n#SBATCH --nodes=2 --time=1:00:00\n#SBATCH --requeue --signal={} --output=%x.log\nsrun true\n"


@pytest.mark.parametrize(
    ("signal", "seconds"), [("USR1@180", 180), ("B:USR1@120", 120), ("R:10@45", 45), ("TERM", 60), ("BR:USR2@9", 9)]
)
def test_a_signal_is_read_from_the_batch_script(signal: str, seconds: float) -> None:
    assert shortest(JOB, SCRIPT.format(signal), PARTITION.format(0, "OFF"), CONFIG) == Grace(seconds, "your signal")


def test_a_signal_on_the_command_line_comes_first() -> None:
    job = f"{JOB} SubmitLine=sbatch --signal=USR1@77 a.sh WorkDir=/tmp"
    assert shortest(job, SCRIPT.format("USR1@180"), "", CONFIG) == Grace(77, "your signal")


def test_only_directives_of_the_script_count() -> None:
    script = "#!/bin/bash\n# --signal=USR1@500\nsrun --signal=USR1@400 true\n"
    found = shortest(JOB, script, "", CONFIG)
    assert found is not None and found.seconds == 30 and "KillWait" in found.giver


def test_a_preemption_may_leave_less_than_the_signal() -> None:
    found = shortest(JOB, SCRIPT.format("USR1@180"), PARTITION.format(60, "REQUEUE"), CONFIG)
    assert found == Grace(90, "a preemption")
    found = shortest(JOB, SCRIPT.format("USR1@180"), PARTITION.format(60, "OFF"), CONFIG)
    assert found == Grace(180, "your signal")


def test_nothing_known_is_nothing_said() -> None:
    assert shortest(JOB, "", "", "") is None


def test_what_does_not_fit_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    grace = Grace(120, "your signal")
    grace.tell(3.14)
    grace.tell(70)
    first, second = caplog.records
    assert (first.levelname, first.getMessage()) == ("INFO", "a save takes 3.1 s, your signal leaves 120 s")
    assert second.levelname == "WARNING" and "--signal=USR1@310" in second.getMessage()
    assert grace.fits(60) and not grace.fits(61)
