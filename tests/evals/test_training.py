"""A classifier's run: checkpoints, the best epoch, stops and restarts without a trace in the result."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clusterssl.dist import World
from clusterssl.errors import Stopped, UserError
from clusterssl.evals.classifier import LinearClassifier, epoch_order, evaluate_probes, steps_in_memory, train_epoch
from clusterssl.evals.training import ClassifierRun, SgdOptions
from tests.evals.logs import restored_logger  # noqa: F401

CPU = torch.device("cpu")
OPTIONS = SgdOptions(epochs=6, batch_size=8, lr=2.0)
FLAGS = {"lr": OPTIONS.lr, "data_path": "a"}


def noisy() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (60,), generator=generator)
    return torch.eye(3)[labels] + torch.randn(60, 3, generator=generator), labels


def run(
    folder: Path, at: Callable[[int], None] = lambda epoch: None, flags: dict[str, Any] = FLAGS, facts: int = 60
) -> dict[str, Any]:
    """Train in `folder`; `at` is called in the middle of every epoch."""
    x, y = noisy()
    classifier = LinearClassifier((3,), 3, seed=0)
    optimizer = OPTIONS.optimizer(classifier)

    def one_epoch(epoch: int) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = OPTIONS.rate(epoch)
        steps = steps_in_memory(x[:40], y[:40], epoch_order(40, 0, epoch), 8)
        loss, _, _ = train_epoch(classifier, optimizer, steps, CPU)
        at(epoch)
        _, top1, top5 = evaluate_probes(classifier, [(x[40:], y[40:])], CPU)[0]
        return {"lr": OPTIONS.rate(epoch), "loss": loss, "top1": top1, "top5": top5}

    training = ClassifierRun("eval_linear", str(folder), World())
    training.open(flags, {"num_images": facts})
    return training.fit(classifier, optimizer, OPTIONS.epochs, one_epoch, 40)


def saved(folder: Path, name: str = "checkpoint.pth.tar") -> dict[str, Any]:
    return torch.load(folder / name, weights_only=True)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else bool(a == b)


def test_killed_and_stopped_runs_end_as_one_without_a_break(tmp_path: Path) -> None:
    def die_in_epoch(number: int) -> Callable[[int], None]:
        def at(epoch: int) -> None:
            if epoch == number:
                raise RuntimeError("killed")

        return at

    def signal_in_epoch_3(epoch: int) -> None:
        if epoch == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = run(tmp_path / "whole")
    for number in (0, 2):
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path / "broken", die_in_epoch(number))
    with pytest.raises(Stopped, match="stopped by SIGTERM after epoch 4 of 6"):
        run(tmp_path / "broken", signal_in_epoch_3)
    assert saved(tmp_path / "broken")["epoch"] == 4
    assert run(tmp_path / "broken") == whole
    assert same(saved(tmp_path / "broken"), saved(tmp_path / "whole"))
    assert run(tmp_path / "broken") == whole  # nothing left to do


def test_the_best_epoch_is_kept_with_published_names(tmp_path: Path) -> None:
    seen: list[int] = []
    best = run(tmp_path, seen.append)
    kept, last = saved(tmp_path, "checkpoints/best.pth.tar"), saved(tmp_path)
    assert list(kept["state_dict"]) == ["module.linear.weight", "module.linear.bias"]
    assert set(kept) >= {"epoch", "state_dict", "optimizer", "scheduler", "best_acc"}
    assert seen == list(range(6))
    assert kept["best_acc"] == last["best_acc"] == best["top1"]
    assert kept["epoch"] == best["epoch"]
    classifier = LinearClassifier((3,), 3)
    classifier.load_state_dict({name[7:]: tensor for name, tensor in kept["state_dict"].items()})
    x, y = noisy()
    assert evaluate_probes(classifier, [(x[40:], y[40:])], CPU)[0][1] == best["top1"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 6


def test_another_run_is_not_continued(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "checkpoint.pth.tar").read_bytes()
    with pytest.raises(UserError, match=r"lr was 2\.0 and is now 3\.0"):
        run(tmp_path, flags={**FLAGS, "lr": 3.0})
    with pytest.raises(UserError, match="num_images was 60 and is now 59"):
        run(tmp_path, facts=59)
    run(tmp_path, flags={**FLAGS, "data_path": "moved"})
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == before


def test_a_pretraining_folder_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pth.tar").write_bytes(b"precious")
    with pytest.raises(UserError, match="choose another folder"):
        run(tmp_path)
    assert (tmp_path / "checkpoint.pth.tar").read_bytes() == b"precious"


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    def diverge(epoch: int) -> None:
        if epoch == 2:
            raise UserError("the training loss is not finite")

    with pytest.raises(UserError):
        run(tmp_path, diverge)
    assert saved(tmp_path)["epoch"] == 2
