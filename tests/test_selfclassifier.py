"""Self-Classifier trains the same on any number of ranks, in micro-batches, and after a kill."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clusterssl.batchnorm import synchronise
from clusterssl.checkpoint import distribute
from clusterssl.cluster.two_softmax import cross_prediction, two_softmax
from clusterssl.config import Size
from clusterssl.dist import World
from clusterssl.files import read_checkpoint
from clusterssl.optim import build_optimizer
from main_selfclassifier import Config, ObjectiveOptions, SelfClassifier
from tests.feeds import GivenFeed
from tests.golden_files import FOLDER
from tests.launch import Launched, metrics, wait_for_step
from tests.ranks import run_ranks

TINY = [
    *("--data_path", "synthetic:96:24x24", "--nmb_crops", "2", "1", "--size_crops", "16", "12"),
    *("--min_scale_crops", "0.4", "0.2", "--max_scale_crops", "1", "0.5", "--arch", "conv4w4", "--hidden_mlp", "16"),
    *("--feat_dim", "8", "--cls_size", "6", "10", "--queue_len", "40", "--base_lr", "0.5", "--warmup_epochs", "1"),
    *("--epochs", "4", "--workers", "0", "--log_freq", "1", "--device", "cpu"),
]
STEPS = 24
IMAGES = 24


def small(batch_size: int = IMAGES, accumulate: int = 1, **objective: Any) -> Config:
    whole = Config()
    data = replace(
        whole.data, nmb_crops=(2, 1), size_crops=(Size(16, 16), Size(12, 12)), min_scale_crops=(0.4, 0.2),
        max_scale_crops=(1.0, 0.5),
    )  # fmt: skip
    model = replace(whole.model, arch="conv4w4", hidden_mlp=16, feat_dim=8, cls_size=(6, 10))
    optim = replace(whole.optim, batch_size=batch_size, accumulate=accumulate, optimizer="sgd", base_lr=0.1)
    goal = ObjectiveOptions(**{"queue_len": 40, **objective})
    return replace(whole, data=data, model=model, optim=optim, objective=goal)


def train(
    rank: int, world_size: int, batch_norm: bool = True, accumulate: int = 1, steps: int = 4, **objective: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of some steps on 24 images in float64, however they are split. The queue is full after two."""
    torch.manual_seed(0)
    config = small(IMAGES // world_size // accumulate, accumulate, **objective)
    net = config.model.build(config.data.size_crops).double()
    net = synchronise(net, "pytorch", 0, torch.device("cpu"))
    if not batch_norm:
        net.apply(lambda m: m.eval() if isinstance(m, nn.modules.batchnorm._BatchNorm) else m)
        net.train = lambda mode=True: net  # type: ignore[method-assign]
    model = distribute(net, World(rank, world_size))
    method = SelfClassifier(model, config, GivenFeed(num_images=60, step_images=IMAGES // world_size))
    groups = config.optim.groups(net)
    optimizer = build_optimizer(groups, config.optim.optimizer, config.optim.base_lr, config.optim.wd)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        images = torch.rand(3, IMAGES, 3, 16, 16, generator=generator).double()
        index = torch.randperm(60, generator=generator)[:IMAGES].chunk(world_size)[rank]
        views = [view.chunk(world_size)[rank] for view in (images[0], images[1], images[2, :, :, :12, :12])]
        crops = zip(*(view.chunk(accumulate) for view in views), strict=True)
        micro = list(zip(map(list, crops), index.chunk(accumulate), strict=True))
        if accumulate > 1:
            method.begin_step(iter(micro))
        step_losses = [method.loss(*batch) / accumulate for batch in micro[:1]]
        step_losses[0].backward()
        for batch in micro[1:]:
            step_losses.append(method.loss(*batch) / accumulate)
            step_losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(loss.item() for loss in step_losses))
    weights = {name.removeprefix("module."): value.detach() for name, value in model.state_dict().items()}
    if method.queue is not None:
        assert method.queue.full and method.queue.pushed == steps * IMAGES
        weights |= {"queue": method.queue.rows_LD, "queue index": method.queue.index_L}
    return losses, weights


def assert_same_training(parts: list[tuple[list, dict]], alone: tuple[list, dict]) -> None:
    for step, expected in enumerate(alone[0]):
        assert sum(part[0][step] for part in parts) / len(parts) == pytest.approx(expected, abs=1e-9)
    for name, expected in alone[1].items():
        for _, weights in parts:
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-9, msg=f"{name} differs")


def test_two_ranks_equal_one_in_float64() -> None:
    """Network with synchronised BatchNorm, loss over the batch of both, queue, neighbours, optimiser."""
    alone = train(0, 1)
    assert_same_training(run_ranks(train, 2), alone)
    without = train(0, 1, no_nn_aug=True)
    assert without[0][:2] == pytest.approx(alone[0][:2], abs=1e-12) and abs(without[0][3] - alone[0][3]) > 1e-3


def test_micro_batches_equal_one_batch() -> None:
    """Without BatchNorm, which sees micro-batches by its nature."""
    assert_same_training([train(0, 1, False, accumulate=3)], train(0, 1, False))


def in_micro_batches(rank: int, world_size: int) -> tuple[list, dict]:
    return train(rank, world_size, False, accumulate=2)


def test_micro_batches_on_two_ranks_equal_one_batch() -> None:
    assert_same_training(run_ranks(in_micro_batches, 2), train(0, 1, False))


def test_the_first_view_is_replaced_by_its_neighbour_once_the_queue_is_full() -> None:
    """The loss by hand, and no gradient through the view that was replaced."""
    config = small(queue_len=2 * IMAGES)
    torch.manual_seed(0)
    net = config.model.build(config.data.size_crops).eval()
    method = SelfClassifier(net, config, GivenFeed(num_images=2 * IMAGES))
    crops = [torch.rand(IMAGES, 3, s, s) for s in (16, 16, 12)]
    for turn in range(3):
        index = torch.arange(IMAGES) + IMAGES * (turn % 2)
        with torch.no_grad():
            embeddings, logits = net(crops)
            by_view = [x.unflatten(0, (3, IMAGES)) for x in logits]
            plain = cross_prediction(two_softmax(by_view))
        crops[0].requires_grad_()
        loss = method.loss(crops, index)
        (gradient,) = torch.autograd.grad(loss, crops[0], allow_unused=True)
        if turn < 2:
            assert torch.equal(loss, plain) and gradient is not None and gradient.any()
            continue
        assert gradient is None or not gradient.any()
        # The queue holds these embeddings twice, under this half of the dataset and under the other.
        near = embeddings[:IMAGES]
        with torch.no_grad():
            expected = [torch.cat([c(near)[None], x[1:]]) for c, x in zip(net.classifiers(), by_view, strict=True)]
            torch.testing.assert_close(loss, cross_prediction(two_softmax(expected)))


def finish(folder: Path, ranks: int, *flags: str) -> str:
    words = [*TINY, "--batch_size", str(16 // ranks), *flags, "--dump_path", str(folder)]
    codes, printed = Launched("main_selfclassifier.py", *words, ranks=ranks).wait()
    assert codes == [0] * ranks, printed
    return printed


def saved(folder: Path, ranks: int) -> dict[str, torch.Tensor]:
    state = read_checkpoint(folder / "checkpoint.pth.tar")
    assert state["step"] == STEPS and state["method_state"]["pushed"] == 16 * STEPS
    shards = [read_checkpoint(folder / f"checkpoint.step{STEPS}.rank{r}-of-{ranks}.pth") for r in range(ranks)]
    queue = {f"queue {name}": torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    assert len(queue["queue rows"]) == 40 and (queue["queue index"] >= 0).all()
    return {**state["state_dict"], **queue}


@pytest.mark.parametrize(("ranks", "kills"), [(1, 2), (2, 1)])
def test_killed_at_random_steps_ends_with_the_same_weights_and_queue(ranks: int, kills: int, tmp_path: Path) -> None:
    finish(tmp_path / "whole", ranks)
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    folder, killed = tmp_path / "killed", 0  # the record of step 2 comes after the checkpoint of step 1
    for step in sorted(chance.sample(range(2, STEPS - 4), kills)):
        words = [*TINY, "--batch_size", str(16 // ranks), "--checkpoint_minutes", "0", "--dump_path", str(folder)]
        launched = Launched("main_selfclassifier.py", *words, ranks=ranks)
        wait_for_step(folder, step, launched)
        time.sleep(chance.random() * 0.02)
        launched.send(signal.SIGKILL)
        killed += -signal.SIGKILL in launched.wait()[0]
    assert killed > 0, "every run ended before it was killed: nothing was tested"
    assert "resuming at epoch" in finish(folder, ranks)
    expected, ours = saved(tmp_path / "whole", ranks), saved(folder, ranks)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), f"{name} differs (random seed {seed})"


def test_continues_on_one_rank_what_two_began(tmp_path: Path) -> None:
    """The next steps are those of two ranks: same images, same queue, same weights."""
    begun = tmp_path / "begun"
    words = [*TINY, "--epochs", "9"]
    flags = ["--batch_size", "8", "--checkpoint_minutes", "0", "--dump_path", str(begun)]
    launched = Launched("main_selfclassifier.py", *words, *flags, ranks=2)
    wait_for_step(begun, 8, launched)
    launched.send(signal.SIGTERM)
    codes, printed = launched.wait()
    assert codes == [75, 75], printed
    start = read_checkpoint(begun / "checkpoint.pth.tar")["step"]
    losses = {}
    for ranks in (1, 2):
        folder = tmp_path / f"on{ranks}"
        shutil.copytree(begun, folder)
        finish(folder, ranks, "--epochs", "9")
        losses[ranks] = {record["step"]: record["loss"] for record in metrics(folder) if "step" in record}
    for step in range(start + 1, start + 3):
        assert abs(losses[1][step] - losses[2][step]) < 1e-4
    assert max(losses[1].values()) - min(losses[1].values()) > 0.01


def test_refuses_the_queue_of_another_dataset(tmp_path: Path) -> None:
    finish(tmp_path, 1, "--epochs", "1")
    words = [*TINY, "--data_path", "synthetic:112:24x24", "--batch_size", "16", "--dump_path", str(tmp_path)]
    codes, printed = Launched("main_selfclassifier.py", *words).wait()
    assert codes == [2] and "num_images was 96 and is now 112" in printed and "Traceback" not in printed


def test_refuses_unknown_classes_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("class1\nclass3\nn01440764 tench\n")
    words = [*TINY, "--batch_size", "16", "--subset_file", str(tmp_path / "classes.txt")]
    codes, printed = Launched("main_selfclassifier.py", *words, "--dump_path", str(tmp_path / "run")).wait()
    assert codes == [2] and not (tmp_path / "run").exists()
    lines = [line for line in printed.splitlines() if "error" in line]
    assert len(lines) == 1 and "1 of 3 classes are not in the data (n01440764)" in lines[0]
    (tmp_path / "classes.txt").write_text("class3\nclass1\n")
    assert "48 images from" in finish(tmp_path / "run", 1, "--subset_file", str(tmp_path / "classes.txt"))


def test_the_first_twenty_losses_are_as_recorded() -> None:
    """A guard: any change of weights, order of operations, queue or loss shows here; record anew only on purpose."""
    recorded = json.loads((FOLDER / "selfclassifier_trace.json").read_text())
    assert train(0, 1, steps=20)[0] == pytest.approx(recorded, abs=1e-6)
