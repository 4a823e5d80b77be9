"""From one command to jobs: what to submit and in which order."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clusterssl.config import require, require_numbers
from clusterssl.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class JobOptions:
    """What to ask the cluster for."""

    nodes: int = 1
    """machines"""
    ngpus: int = 8
    """GPUs of each, and ranks on it; 0: one rank without a GPU"""
    partition: str = ""
    """queue; the cluster's default without it"""
    timeout: int = 4320
    """minutes until the job is saved and requeued"""
    cpus: int = 10
    """cores per rank: loader processes and one more"""
    mem: str = ""
    """memory of each machine, such as 450G; 56G per rank without it"""
    account: str = ""
    """whom to charge"""
    qos: str = ""
    """quality of service"""
    constraint: str = ""
    """features the machines must have"""
    comment: str = ""
    """for the operators, as some clusters ask for high priority"""
    exclude: str = ""
    """machines to avoid"""
    name: str = ""
    """of the job; the script's without it"""
    signal_seconds: int = 180
    """time to save before the limit"""
    max_timeouts: int = 100
    """how often a job that meets its time limit goes on"""

    def __post_init__(self) -> None:
        require_numbers(self, "nodes", "timeout", "cpus", "signal_seconds", least=1)
        require_numbers(self, "ngpus", "max_timeouts", least=0)

    @property
    def tasks(self) -> int:
        """Ranks per machine."""
        return max(self.ngpus, 1)


@dataclass(frozen=True)
class Step:
    """One job: a script with its flags, and the steps that have to end well before."""

    script: Path
    flags: tuple[str, ...]
    options: JobOptions
    after: str = ""
    """dependency in Slurm's words, such as afterok:12"""


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own flags, and the script with its flags, which are left as they are.

    Raises:
        UserError: there is no script, or no such file.
    """
    at = next((number for number, word in enumerate(argv) if word.endswith(".py")), len(argv))
    if at == len(argv):
        if {"-h", "--help"} & set(argv):
            return list(argv), []
        raise UserError("name the script to run, e.g. run_with_submitit.py --nodes 2 main_swav.py --data_path ...")
    return list(argv[:at]), list(argv[at:])


def find_script(name: str) -> Path:
    """The script as named, or beside this checkout's.

    Raises:
        UserError: no such file.
    """
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path.resolve()
    raise UserError(f"{name}: no such script; give its path")


def value_of(flags: Sequence[str], name: str) -> str:
    """The value a command line gives a flag last; empty if none."""
    found = ""
    for word, following in itertools.zip_longest(flags, flags[1:], fillvalue=""):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            found = value if equals else following
    return found


def variants(flags: Sequence[str], array: Sequence[str], sweep: Sequence[str]) -> list[tuple[str, ...]]:
    """Command lines of an array of jobs: every combination of the values, each with a run directory of its own.

    Args:
        flags: of the script.
        array: a flag's name (seeds stands for seed) and its values, e.g. ("seeds", "0", "1").
        sweep: one or several such as "base_lr=0.3,0.6".

    Raises:
        UserError: no values, or no --dump_path to put the directories below.
    """
    axes: list[tuple[str, list[str]]] = []
    if array:
        axes.append(("seed" if array[0] == "seeds" else array[0], list(array[1:])))
    for text in sweep:
        name, _, listed = text.partition("=")
        axes.append((name, [value for value in listed.split(",") if value]))
    axes = [(name.lstrip("-").replace("-", "_"), values) for name, values in axes]
    for name, values in axes:
        require(bool(name and values), f"--array/--sweep {name}: give values, as in --sweep base_lr=0.3,0.6")
    if not axes:
        return [tuple(flags)]
    folder = value_of(flags, "dump_path")
    require(bool(folder), "--array/--sweep: the script needs --dump_path, each job gets a folder below it")
    found = []
    for chosen in itertools.product(*(values for _, values in axes)):
        pairs = list(zip((name for name, _ in axes), chosen, strict=True))
        below = "_".join(f"{name}-{value}" for name, value in pairs)
        words = [word for name, value in pairs for word in (f"--{name}", value)]
        found.append((*flags, *words, "--dump_path", str(Path(folder) / below)))
    return found


def evaluations(flags: Sequence[str], chain: Sequence[str], data_path: str, options: JobOptions) -> list[Step]:
    """Steps that evaluate the run of a command line, one after another on one machine, without their dependencies.

    Args:
        flags: of the training.
        chain: "eval_linear" or "eval_linear --lr 0.1", one each.
        data_path: images to evaluate on; from the training's without it.
        options: of the training.

    Raises:
        UserError: no such evaluation, or no --dump_path to find the checkpoint by.
    """
    folder = value_of(flags, "dump_path")
    require(not chain or bool(folder), "--chain: the script needs --dump_path, to find its checkpoint by")
    data = Path(value_of(flags, "data_path") or "digits")
    images = data_path or str(data.parent if data.name == "train" else data)
    steps = []
    for text in chain:
        name, *more = shlex.split(text)
        words = ["--pretrained", str(Path(folder) / "checkpoint.pth.tar"), "--data_path", images]
        words += ["--dump_path", str(Path(folder) / name)]
        one = replace(options, nodes=1, name=f"{options.name}-{name}")
        steps.append(Step(find_script(f"{name}.py"), (*words, *more), one))
    return steps


def report(flags: Sequence[str], options: JobOptions) -> Step:
    """The step that writes the report page of a run."""
    small = replace(options, nodes=1, ngpus=0, cpus=1, mem="4G", timeout=10, name=f"{options.name}-report")
    return Step(find_script("report.py"), (value_of(flags, "dump_path"),), small)
