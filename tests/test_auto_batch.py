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
from PIL import Image

from clusterssl import auto_batch
from clusterssl.auto_batch import FACTOR, choices, confirmed, largest, scaled, trial_step, with_batch
from clusterssl.cluster.online import AssignmentOptions
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.options import OptimOptions
from clusterssl.plan.blueprint import read_script
from clusterssl.precision import Precision
from main_selfclassifier import Config as SelfClassifierConfig
from main_selfclassifier import ObjectiveOptions, StepOptions
from main_swav import Config
from tests.launch import ROOT, TINY, Launched, metrics
from tests.ranks import run_ranks
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

    for words in ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"):

        def short(batch: int, words: str = words) -> None:
            if batch > 8:
                raise RuntimeError(words)

        assert confirmed(64, short) == 8


@pytest.mark.parametrize(
    "script",
    ["main_swav.py", "main_selfclassifier.py", "main_sela.py", "main_deepcluster.py", "train_on_labels.py"],
)
def test_the_step_that_confirms_is_one_of_every_network(script: str, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("path,head0\na.jpg,0\nb.jpg,3\n")
    own = {"main_sela.py": ["--version", "1"], "main_selfclassifier.py": METHODS["selfclassifier"][1],
           "train_on_labels.py": ["--labels", str(labels), "--rotation"]}  # fmt: skip
    plan = read_script(ROOT / script, [*SHARED, "--size_crops", "16", *own.get(script, [])], 1, 1)
    for dtype in (None, torch.bfloat16):
        trial_step(plan.config, plan.make_model, torch.device("cpu"), Precision(dtype))


class Noted(torch.nn.Linear):
    """Records the number format of its outputs."""

    seen: torch.dtype | None = None

    def forward(self, crops: list[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        scores = super().forward(crops[0].flatten(1))
        Noted.seen = scores.dtype
        return scores


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_step_that_confirms_takes_the_precision_of_the_run(dtype: torch.dtype | None) -> None:
    plan = read_script(ROOT / "main_swav.py", [*SHARED, "--nmb_crops", "2", "--size_crops", "4"], 1, 1)
    trial_step(plan.config, lambda config: Noted(48, 5), torch.device("cpu"), Precision(dtype))
    assert Noted.seen == (dtype or torch.float32)


@pytest.mark.gpu
def test_a_trial_that_runs_out_of_memory_is_answered_by_a_smaller_batch() -> None:
    plan = read_script(ROOT / "main_swav.py", ["--arch", "resnet50", "--nmb_crops", "2", "--size_crops", "224"], 1, 1)
    free, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(6e9, 0.9 * free) / total)
    tried: list[int] = []

    def attempt(batch: int) -> None:
        tried.append(batch)
        trial_step(scaled(plan.config, batch, 1), plan.make_model, torch.device("cuda"), Precision(torch.bfloat16))

    try:
        found = confirmed(1024, attempt)
        assert 0 < found == tried[-1] < 1024 and len(tried) > 1
        assert torch.cuda.memory_reserved() < 1e9, "memory of the trials is kept"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def broken_on_the_last(rank: int, ranks: int) -> str:
    """What a rank says when the trial fails on one of them."""

    def make_model(config: Config) -> torch.nn.Module:
        if rank == ranks - 1:
            raise ValueError("broken")
        return torch.nn.Linear(1, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto_batch, "trial_step", lambda config, make_model, device, precision: make_model(config))
        try:
            auto_batch._tried(Config(), 64, World(rank=rank, size=ranks), make_model, Precision())
        except (ValueError, UserError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_a_trial_that_fails_on_one_rank_ends_all() -> None:
    first, second = run_ranks(broken_on_the_last, 2)
    assert first.startswith("UserError: another rank stopped") and second == "ValueError: broken"


def resumed(before: dict, *, batch_size: int = 64, **rates: float) -> tuple[Config, dict]:
    config = Config(optim=OptimOptions(batch_size=batch_size, **rates), assignment=AssignmentOptions(queue_length=3840))
    return with_batch(config, 10**6, World(), lambda config: None, Precision(), before)


def test_a_resumed_run_takes_new_rates_by_the_factor_of_its_first_start() -> None:
    before = {"global_batch": 256, "base_lr": 9.6, "queue_length": 3840, FACTOR: 4.0}
    config, facts = resumed(before, base_lr=0.1, final_lr=0.01, start_warmup=0.02)
    assert facts == {FACTOR: 4.0} and config.optim.batch_size == 256 and config.assignment.queue_length == 3840
    assert (config.optim.base_lr, config.optim.final_lr, config.optim.start_warmup) == (0.4, 0.04, 0.08)
    given, _ = resumed({"global_batch": 256, "base_lr": 9.6, "queue_length": 4096}, base_lr=0.1)
    assert (given.optim.batch_size, given.optim.base_lr) == (256, 0.1), "a run that began without --auto_batch"


def test_planning_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_batch, "PLANNING_S", 0.05)
    monkeypatch.setattr("sys.argv", [str(ROOT / "main_swav.py"), *FLAGS])
    with pytest.raises(UserError, match=r"--auto_batch: the batch could not be planned: no answer within 0.05 s"):
        with_batch(Config(), 10**6, World(), lambda config: None, Precision(), None)


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
    assert codes == [0, 0] and "an epoch keeps 10 steps; memory would allow more" in printed, printed
    assert printed.count("--auto_batch: ") == 2, "one line at its start, one at its end"
    record = json.loads((tmp_path / "run.json").read_text())
    assert batch(tmp_path) == 32 and record["facts"]["global_batch"] == 64
    assert record["config"]["queue_length"] == 128 and record["config"]["base_lr"] == pytest.approx(0.32)
    more = ["--queue_length", "100", "--epochs", "3", "--base_lr", "0.01"]
    codes, printed = Launched("main_swav.py", *words, *more).wait()
    told = "--batch_size 64 (given: 10), --base_lr 0.032 (given: 0.01, in proportion"
    assert codes == [0] and told in printed and "looking for" not in printed, printed
    assert "--batch_size differs from the first start: was 32, is now 64" in printed and "resuming" in printed
    rates = [line["lr"] for line in metrics(tmp_path) if line.get("epoch") == 2 and "lr" in line]
    assert rates and max(rates) <= 0.032
    codes, printed = Launched("main_swav.py", *words, "--queue_length", "100", ranks=3).wait()
    assert codes == [2] * 3 and "64 images a step" in printed
    codes, printed = Launched("main_swav.py", *words, "--queue_length", "200").wait()
    assert codes == [2] and "queue_length was 128 and is now 256" in printed, printed


def test_a_batch_without_a_checkpoint_is_planned_again(tmp_path: Path) -> None:
    words = [*FLAGS, "--dump_path", str(tmp_path), "--queue_length", "100"]
    codes, printed = Launched("main_swav.py", *words, "--data_path", "synthetic:700:24x24").wait()
    assert codes == [0], printed
    record = json.loads((tmp_path / "run.json").read_text())
    chosen = record["config"]["batch_size"]
    assert chosen > 16
    for name in ("batch_size", "queue_length"):
        record["config"][name] *= 64
    for name in ("global_batch", FACTOR):
        record["facts"][name] *= 64
    record["facts"]["steps_per_epoch"] = 1
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "checkpoint.pth.tar").unlink()
    codes, printed = Launched("main_swav.py", *words, "--data_path", "synthetic:700:24x24").wait()
    assert codes == [0] and "an epoch keeps 10 steps; memory would allow more" in printed, printed
    now = json.loads((tmp_path / "run.json").read_text())
    assert now["config"]["batch_size"] == now["facts"]["global_batch"] == chosen
    assert now["config"]["queue_length"] == record["config"]["queue_length"] // 64
    codes, printed = Launched("main_swav.py", *words, "--data_path", "synthetic:700:24x24", "--epochs", "2").wait()
    assert codes == [0] and "as at the first start" in printed, printed


def test_a_folder_of_another_run_is_refused_before_anything_is_planned_or_read(tmp_path: Path) -> None:
    about = {"method": "sela", "config": {"seed": 5}, "facts": {}}
    (tmp_path / "run.json").write_text(json.dumps(about))
    words = [*FLAGS, "--dump_path", str(tmp_path), "--data_path", str(tmp_path / "nothing")]
    codes, printed = Launched("main_swav.py", *words).wait()
    assert codes == [2] and "holds a run of sela, not swav" in printed, printed
    (tmp_path / "run.json").write_text(json.dumps({**about, "method": "swav"}))
    codes, printed = Launched("main_swav.py", *words).wait()
    assert codes == [2] and "seed was 5 and is now" in printed, printed
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_labels_of_real_images(tmp_path: Path) -> None:
    pictures, labels, rows = tmp_path / "pictures", tmp_path / "labels.csv", []
    pictures.mkdir()
    for number in range(90):
        path = pictures / f"{number:03}.jpg"
        Image.new("RGB", (24, 24), (number, 2 * number, 90)).save(path)
        rows.append(f"{path},{number % 3}")
    labels.write_text("\n".join(["path,head0", *rows]))
    words = ["--data_path", str(pictures), "--labels", str(labels), "--arch", "conv4w4", "--size_crops", "16"]
    words += ["--workers", "0", "--device", "cpu", "--epochs", "1", "--batch_size", "2", "--report", "false"]
    codes, printed = Launched("train_on_labels.py", *words, "--auto_batch", "--dump_path", str(tmp_path / "run")).wait()
    assert codes == [0] and "--batch_size 8 (given: 2)" in printed, printed


def test_the_batch_is_planned_with_the_dataset_on_the_device(tmp_path: Path) -> None:
    words = [*FLAGS, "--data_path", "synthetic:200:24x24", "--cache", "device", "--dump_path", str(tmp_path)]
    codes, printed = Launched("main_swav.py", *words).wait()
    assert codes == [0], printed
    assert printed.index("--cache device: 200 images") < printed.index("--auto_batch: --batch_size")
