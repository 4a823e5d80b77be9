"""Run a script of this project, or any other, as a job of a Slurm cluster, through submitit.

    python run_with_submitit.py --nodes 2 --ngpus 8 --partition P --timeout 4320 main_swav.py --dump_path runs/mine
    python run_with_submitit.py --local main_swav.py --dump_path runs/here

What follows the script's name is passed on as it is. The job saves and requeues itself when it is preempted or meets
its time limit, and goes on where it was.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from clusterssl import config as cfg
from clusterssl.jobs import DryRun, Local, Slurm, check_folder, check_slurm
from clusterssl.submission import JobOptions, Step, evaluations, find_script, report, split, variants


@dataclass(frozen=True)
class SubmitOptions:
    """What to do with it."""

    job_dir: str = "runs/jobs/%j"
    """folder of logs and pickles, on a disk that all machines share; %j is the job's number"""
    local: bool = False
    """run on this machine, without Slurm, and follow it"""
    dry_run: bool = False
    """show the sbatch file instead of submitting it"""
    wait: bool = False
    """follow the job to its end and end with its exit code; the job goes on if this is interrupted"""
    array: tuple[str, ...] = ()
    """a flag and its values, one job each: seeds 0 1 2; each job gets a folder below --dump_path"""
    sweep: tuple[str, ...] = ()
    """the same for one or several flags in all combinations: base_lr=0.3,0.6 epsilon=0.03,0.05"""
    chain: tuple[str, ...] = ()
    """evaluations of the finished run, then its report page: eval_linear "eval_knn --nb_knn 20" """
    eval_data_path: str = ""
    """images for the evaluations; from the script's --data_path without it (the folder above train/)"""


@dataclass(frozen=True)
class Config:
    job: JobOptions = JobOptions()
    submit: SubmitOptions = SubmitOptions()


def tell(text: str) -> None:
    """Show at once."""
    print(text, end="", flush=True)


def options_of(config: Config, ours: Sequence[str], script: Path) -> JobOptions:
    """What to ask for, with a name, and on this machine with as many GPUs as it has."""
    options = replace(config.job, name=config.job.name or script.stem)
    if config.submit.local and not cfg.gives(ours, "ngpus"):
        options = replace(options, ngpus=local_gpus())
    cfg.require(not config.submit.local or options.nodes == 1, f"--local: runs on one machine, not on {options.nodes}")
    return options


def local_gpus() -> int:
    """GPUs of this machine; 0 without NVIDIA's tools."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    except OSError:
        return 0
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0


def run_here(local: Local, trainings: Sequence[Step], submit: SubmitOptions) -> int:
    """Run everything in turn; returns the first exit code that is not 0."""
    for training in trainings:
        steps = [training, *evaluations(training.flags, submit.chain, submit.eval_data_path, training.options)]
        for step in [*steps, *([report(training.flags, training.options)] if submit.chain else [])]:
            code = local.run(step, tell)
            if code:
                return code
    return 0


def submit_all(cluster: Slurm, trainings: Sequence[Step], submit: SubmitOptions) -> list[str]:
    """Numbers of all jobs: the trainings, then evaluations and reports that wait for them."""
    numbers = cluster.submit(trainings)
    chained: list[str] = []
    for number, training in zip(numbers, trainings, strict=True):
        steps = evaluations(training.flags, submit.chain, submit.eval_data_path, training.options)
        evaluating = [cluster.submit([replace(step, after=f"afterok:{number}")])[0] for step in steps]
        if evaluating:
            last = report(training.flags, training.options)
            evaluating += cluster.submit([replace(last, after="afterok:" + ":".join(evaluating))])
        chained += evaluating
    return [*numbers, *chained]


def follow(cluster: Slurm, numbers: Sequence[str]) -> int:
    """Wait for all jobs; returns the first exit code that is not 0."""
    try:
        return next((code for code in [cluster.follow(number, tell) for number in numbers] if code), 0)
    except KeyboardInterrupt:
        tell(f"\nno longer following; scancel {' '.join(numbers)} ends what still runs\n")
        raise


def main() -> None:
    ours, theirs = split(sys.argv[1:])
    config = cfg.parse(Config, ours, description=__doc__)
    submit, script = config.submit, find_script(theirs[0])
    options = options_of(config, ours, script)
    trainings = [Step(script, flags, options) for flags in variants(theirs[1:], submit.array, submit.sweep)]
    for training in trainings:  # what cannot work is said before anything is submitted
        evaluations(training.flags, submit.chain, submit.eval_data_path, options)
    folder = check_folder(submit.job_dir)
    if submit.local and not submit.dry_run:
        sys.exit(run_here(Local(folder), trainings, submit))
    cluster = DryRun(folder, tell) if submit.dry_run else Slurm(folder)
    if not submit.dry_run:
        check_slurm()
    numbers = submit_all(cluster, trainings, submit)
    if not submit.dry_run:
        for number in numbers:
            tell(f"job {number}: log in {os.path.relpath(cluster.log(number))}\n")
        sys.exit(follow(cluster, numbers) if submit.wait else 0)


if __name__ == "__main__":
    cfg.entry(main)
