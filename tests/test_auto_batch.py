"""--auto_batch: the search against trying all, and batches that really fit into the memory there is."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clusterssl.auto_batch import choices, confirmed, largest, one_step, scaled
from clusterssl.cluster.online import AssignmentOptions
from clusterssl.options import OptimOptions
from clusterssl.plan.blueprint import read_script
from main_selfclassifier import Config as SelfClassifierConfig
from main_selfclassifier import ObjectiveOptions, StepOptions
from main_swav import Config
from tests.launch import ROOT, TINY, Launched
from tests.test_methods import METHODS, SHARED

FLAGS = [*TINY, "--data_path", "synthetic:3000:24x24", "--arch", "conv4", "--epochs", "1", "--log_freq", "10"]
FLAGS += ["--optimizer", "sgd", "--base_lr", "0.1", "--batch_size", "10", "--auto_batch"]

GROWTHS: dict[str, Callable[[int], int]] = {
    "straight": lambda n: 1000 + 37 * n,
    "steps of 64": lambda n: 500 + 4000 * math.ceil(n / 64),
    "flat, then steep": lambda n: max(9000, 1000 + 90 * n),
    "curved": lambda n: 100 + n * n // 7,
    "root": lambda n: int(1000 * math.sqrt(n)),
    "always the same": lambda n: 5000,
}


@pytest.mark.parametrize("name", GROWTHS)
def test_the_search_finds_what_trying_all_finds(name: str) -> None:
    chance = random.Random(1)
    for _ in range(300):
        most, limit = chance.randint(1, 5000), 10 ** chance.uniform(2, 6)
        asked: list[int] = []

        def needed(n: int, asked: list[int] = asked) -> int:
            asked.append(n)
            return GROWTHS[name](n)

        tried = [n for n in range(1, most + 1) if n in (1, 2, 4) or n % 8 == 0]
        assert choices(most) == tried
        best = max((n for n in tried if GROWTHS[name](n) <= limit), default=0)
        assert largest(needed, limit, most) == best
        assert len(asked) == len(set(asked)) <= 6 + math.log2(len(tried)) + 1
        if name == "straight":
            assert len(asked) <= 5


def test_rates_and_queue_follow_the_batch() -> None:
    optim = OptimOptions(batch_size=64, accumulate=2, base_lr=0.6, final_lr=0.0006, start_warmup=0.3)
    config = Config(optim=optim, assignment=AssignmentOptions(queue_length=3840))
    new = scaled(config, 240, ranks=3)
    assert (new.optim.batch_size, new.optim.base_lr) == (240, pytest.approx(2.25))
    assert (new.optim.final_lr, new.optim.start_warmup) == (pytest.approx(0.00225), pytest.approx(1.125))
    assert new.assignment.queue_length == 4320 and new.assignment.queue_length % (240 * 2 * 3) == 0
    assert scaled(config, 64, ranks=5).optim == optim
    assert scaled(config, 2000, ranks=1).assignment.queue_length == 4000
    adamw = scaled(Config(optim=OptimOptions(batch_size=64, optimizer="adamw", base_lr=1e-3)), 256, ranks=1)
    assert adamw.optim.base_lr == pytest.approx(2e-3) and adamw.assignment.queue_length == 0
    other = SelfClassifierConfig(optim=StepOptions(batch_size=64), objective=ObjectiveOptions(queue_len=500))
    assert [scaled(other, n, 2).objective.queue_len for n in (64, 256)] == [500, 512]


def test_halves_until_a_real_step_fits() -> None:
    tried: list[int] = []

    def attempt(batch: int) -> None:
        tried.append(batch)
        if batch > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert confirmed(1000, attempt) == 56 and tried == [1000, 496, 248, 120, 56]
    assert confirmed(72, attempt) == 72

    def never(batch: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert confirmed(12, never) == 0
    with pytest.raises(RuntimeError, match="another"):
        confirmed(8, lambda batch: (_ for _ in ()).throw(RuntimeError("another")))


@pytest.mark.parametrize("script", ["main_swav.py", "main_selfclassifier.py", "main_sela.py", "main_deepcluster.py"])
def test_the_step_that_confirms_is_one_of_every_network(script: str) -> None:
    own = {"main_sela.py": ["--version", "1"], "main_selfclassifier.py": METHODS["selfclassifier"][1]}
    plan = read_script(ROOT / script, [*SHARED, "--size_crops", "16", *own.get(script, [])], 1, 1)
    one_step(plan.config, plan.make_model, torch.device("cpu"))


def within(mib: int, folder: Path) -> tuple[int, float, str]:
    """Batch, growth in MiB and output of a run of one epoch with so much more memory than it begins with."""
    words = ["tests/with_memory.py", str(mib), str(ROOT / "main_swav.py"), *FLAGS, "--size_crops", "40", "32"]
    codes, printed = Launched(*words, "--dump_path", str(folder)).wait()
    assert codes == [0], printed
    grown = re.search(r"grown by (\d+) MiB", printed)
    assert grown is not None
    return batch(folder), float(grown[1]), printed


def batch(folder: Path) -> int:
    return json.loads((folder / "run.json").read_text())["config"]["batch_size"]


@pytest.mark.slow
def test_the_batch_fits_and_twice_the_memory_makes_it_larger(tmp_path: Path) -> None:
    found = {mib: within(mib, tmp_path / str(mib)) for mib in (400, 800)}
    for mib, (chosen, grown, printed) in found.items():
        assert grown <= mib
        assert chosen % 8 == 0 and f"--auto_batch: --batch_size {chosen} (given: 10)" in printed
        assert f"--base_lr {0.01 * chosen:g} " in printed
    assert 16 < found[400][0] < found[800][0] < 300
    assert found[800][1] > 0.3 * 800, "most of what there is lies idle"


def test_a_resumed_run_keeps_its_batch_on_other_ranks_too(tmp_path: Path) -> None:
    words = [*FLAGS, "--epochs", "2", "--dump_path", str(tmp_path), "--data_path", "synthetic:700:24x24"]
    codes, printed = Launched("main_swav.py", *words, "--queue_length", "100", ranks=2).wait()
    assert codes == [0, 0] and "an epoch keeps 10 steps" in printed, printed
    record = json.loads((tmp_path / "run.json").read_text())
    assert batch(tmp_path) == 32 and record["facts"]["global_batch"] == 64
    assert record["config"]["queue_length"] == 128 and record["config"]["base_lr"] == pytest.approx(0.32)
    codes, printed = Launched("main_swav.py", *words, "--queue_length", "100", "--epochs", "3").wait()
    assert codes == [0] and "--base_lr" not in printed.replace("with a lower --base_lr", ""), printed
    assert "--batch_size differs from the first start: was 32, is now 64" in printed and "resuming" in printed
    codes, printed = Launched("main_swav.py", *words, "--queue_length", "100", ranks=3).wait()
    assert codes == [2] * 3 and "64 images a step" in printed
