from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import main_deepclusterv2
from clusterssl import config as cfg
from clusterssl.batchnorm import synchronise
from clusterssl.checkpoint import distribute
from clusterssl.cluster.memory import IGNORED
from clusterssl.dist import World
from clusterssl.files import read_checkpoint
from clusterssl.models.build import build_model
from clusterssl.options import DataOptions, OptimOptions
from tests.feeds import GivenFeed
from tests.golden_files import FOLDER, Golden
from tests.launch import TINY, Launched, metrics, wait_for_step
from tests.ranks import run_ranks

GOLDEN = Golden("dcv2_train")


class EmbeddingsGiven(nn.Module):
    """Stands where the network stands and passes the embeddings that it is given; prototypes are real."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights)
        for layer, weight_KD in zip(self.prototype_layers(), weights, strict=True):
            layer.weight.data = weight_KD.clone()

    def prototype_layers(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def forward(self, crops: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        return crops[0], [layer(crops[0]) for layer in self.layers]


def golden_method(case: str) -> main_deepclusterv2.DeepClusterV2:
    """The method as it is before the first golden step; with one head only one crop can be clustered."""
    given = GOLDEN.params(case)
    views, heads = given["nmb_crops"], len(given["K"])
    sizes, low, high = (cfg.Size(8, 8),) * len(views), (0.5,) * len(views), (1.0,) * len(views)
    config = main_deepclusterv2.Config(
        DataOptions(nmb_crops=tuple(views), size_crops=sizes, min_scale_crops=low, max_scale_crops=high),
        deepclusterv2=main_deepclusterv2.DeepClusterV2Options(
            tuple(given["assign"])[:heads], given["temp"], tuple(given["K"]), given["freeze"]
        ),
        optim=OptimOptions(batch_size=given["B"]),
    )
    slots = len(GOLDEN[f"{case}_memory_index_before"])
    net = EmbeddingsGiven([torch.from_numpy(GOLDEN[f"{case}_W{h}"]) for h in range(heads)])
    feed = GivenFeed(steps_per_epoch=slots, step_images=1, num_images=given["N"], global_batch=1)
    method = main_deepclusterv2.DeepClusterV2(net, config, feed)  # type: ignore[arg-type]
    labels = method.labels
    labels.table_HN = torch.from_numpy(GOLDEN[f"{case}_assignments"]).int()
    labels.memory.embeddings_AMD.copy_(torch.from_numpy(GOLDEN[f"{case}_memory_before"][:heads]))
    labels.memory.index_M.copy_(torch.from_numpy(GOLDEN[f"{case}_memory_index_before"]))
    return method


@pytest.mark.parametrize("case", ["multicrop", "one_head"])
def test_follows_the_golden_steps(case: str) -> None:
    method, given = golden_method(case), GOLDEN.params(case)
    near = partial(torch.testing.assert_close, rtol=0, atol=2e-5)
    for step in range(given["iters"]):
        z = torch.from_numpy(GOLDEN[f"{case}_z"][step]).requires_grad_()
        method.net.zero_grad()
        loss = method.loss([z], torch.from_numpy(GOLDEN[f"{case}_idx"][step]))
        loss.backward()
        method.before_step(step)
        assert abs(loss.item() - GOLDEN[f"{case}_loss"][step]) < 2e-5
        near(z.grad, torch.from_numpy(GOLDEN[f"{case}_grad_z"][step]))
        for head, layer in enumerate(method.net.prototype_layers()):
            absent = layer.weight.grad is None
            assert absent == bool(GOLDEN[f"{case}_grad_w_is_none"][step])
            if not absent:
                near(layer.weight.grad, torch.from_numpy(GOLDEN[f"{case}_grad_W{head}"][step]))
    memory = method.labels.memory
    assert torch.equal(memory.index_M, torch.from_numpy(GOLDEN[f"{case}_memory_index_after"]))
    after = torch.from_numpy(GOLDEN[f"{case}_memory_after"][: len(given["K"])])
    near(memory.embeddings_AMD, after)


def test_a_batch_of_unlabelled_images_moves_nothing() -> None:
    method = golden_method("multicrop")
    method.labels.table_HN.fill_(IGNORED)
    z = torch.from_numpy(GOLDEN["multicrop_z"][0]).requires_grad_()
    loss = method.loss([z], torch.from_numpy(GOLDEN["multicrop_idx"][0]))
    loss.backward()
    assert loss.item() == 0 and z.grad is not None and torch.equal(z.grad, torch.zeros_like(z))


STEPS, IMAGES, KS = 3, 26, (5, 4, 3)
"""of an epoch of 24 images; two images are in no slot"""


def small_config(accumulate: int = 1) -> main_deepclusterv2.Config:
    base = main_deepclusterv2.DIGITS
    options = replace(base.deepclusterv2, nmb_prototypes=KS, freeze_prototypes_niters=STEPS)
    return replace(base, deepclusterv2=options, optim=replace(base.optim, batch_size=8 // accumulate))


def train(
    rank: int, world_size: int, batch_norm: bool = True, accumulate: int = 1, epochs: int = 2
) -> tuple[list[float], dict[str, Tensor], Tensor]:
    """Losses, weights and last labels of DeepCluster-v2 in float64, however a step's 8 images are split."""
    torch.manual_seed(0)
    net = build_model("conv4w4", "small", 16, 8, KS, head_bn=batch_norm).double()
    synchronise(net, "pytorch", 0, torch.device("cpu"))
    if not batch_norm:
        net.eval()
        net.train = lambda mode=True: net  # type: ignore[method-assign]
    model = distribute(net, World(rank, world_size))
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(epochs, STEPS, 2, 8, 3, 16, 16, generator=generator).double()
    index = torch.stack([torch.randperm(IMAGES, generator=generator)[: STEPS * 8] for _ in range(epochs)])
    index = index.view(epochs, STEPS, 8)
    share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    feed = GivenFeed(STEPS, 8 // world_size, IMAGES, 8, seed=3)
    feed.batches = [([*step[:, share]], where[share]) for step, where in zip(images[0], index[0], strict=True)]
    method = main_deepclusterv2.DeepClusterV2(model, small_config(accumulate), feed)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for epoch in range(epochs):
        method.begin_epoch(epoch)
        for step in range(STEPS):
            optimizer.zero_grad()
            total = 0.0
            for micro in torch.arange(8)[share].chunk(accumulate):
                loss = method.loss([*images[epoch, step][:, micro]], index[epoch, step][micro]) / accumulate
                loss.backward()
                total += loss.item()
            method.before_step(epoch * STEPS + step)
            optimizer.step()
            losses.append(total)
    weights = {name.removeprefix("module."): value.detach() for name, value in model.state_dict().items()}
    return losses, weights, method.labels.table_HN


def test_training_on_two_ranks_equals_one_in_float64() -> None:
    """First pass, k-means of every head, labels, loss with unseen images, memory, gradients, trained prototypes."""
    alone, parts = train(0, 1), run_ranks(train, 2)
    for step, expected in enumerate(alone[0]):
        assert abs(sum(part[0][step] for part in parts) / 2 - expected) < 1e-9
    assert (alone[2] == IGNORED).any(1).all()
    for _, weights, table in parts:
        assert torch.equal(table, alone[2])
        for name, expected_weight in alone[1].items():
            torch.testing.assert_close(weights[name], expected_weight, rtol=0, atol=1e-9, msg=f"{name} differs")


def test_accumulation_equals_one_large_batch() -> None:
    """Without BatchNorm, which sees micro-batches by its nature, in the epoch in which all images have labels."""
    whole, parts = (train(0, 1, batch_norm=False, accumulate=a, epochs=1) for a in (1, 4))
    assert torch.equal(whole[2], parts[2])
    for step in range(STEPS):
        assert abs(whole[0][step] - parts[0][step]) < 1e-9
    for name, expected in whole[1].items():
        torch.testing.assert_close(parts[1][name], expected, rtol=0, atol=1e-9, msg=f"{name} differs")


def test_prototypes_are_the_centroids_of_their_crop() -> None:
    """Every label is the nearest prototype to the image's embedding in the crop that the head is made from."""
    torch.manual_seed(0)
    net = build_model("conv4w4", "small", 16, 8, KS)
    generator = torch.Generator().manual_seed(1)
    feed = GivenFeed(STEPS, 8, IMAGES, 8)
    feed.batches = [
        ([*torch.rand(2, 8, 3, 16, 16, generator=generator)], torch.arange(8 * s, 8 * s + 8)) for s in range(STEPS)
    ]
    method = main_deepclusterv2.DeepClusterV2(net, small_config(), feed)  # type: ignore[arg-type]
    statistics = net.backbone.state_dict()["bn1.running_mean"]
    before = statistics.clone()
    method.begin_epoch(0)
    assert not torch.equal(statistics, before), "the first pass runs in training mode"
    memory = method.labels.memory
    assert torch.equal(memory.index_M, torch.arange(24))
    for head, layer in enumerate(method.net.prototype_layers()):
        torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(KS[head]))
        nearest = (memory.embeddings_AMD[head % 2] @ layer.weight.T).argmax(1)
        assert torch.equal(method.labels.of(torch.arange(24))[head], nearest)
    assert (method.labels.of(torch.arange(24, IMAGES)) == IGNORED).all()


def test_the_first_twenty_losses_are_as_recorded() -> None:
    """A guard: any change of draws, order of operations, labels or loss shows here; record anew only on purpose."""
    recorded = json.loads((FOLDER / "deepclusterv2_trace.json").read_text())
    losses = train(0, 1, epochs=7)[0][:20]
    assert max(abs(a - b) for a, b in zip(losses, recorded, strict=True)) < 1e-6


FLAGS = [*TINY, "--data_path", "synthetic:100:24x24", "--nmb_prototypes", "12", "9", "5", "--batch_size"]
LAST = 24
"""of 4 epochs of 6 steps; 4 of the 100 images are in no slot"""


def finish(folder: Path, ranks: int, *flags: str) -> str:
    codes, printed = Launched("main_deepclusterv2.py", *FLAGS, *flags, "--dump_path", str(folder), ranks=ranks).wait()
    assert codes == [0] * ranks, printed
    return printed


def ended(folder: Path) -> dict[str, Tensor]:
    """Weights, memory and labels at the end of a run."""
    state = read_checkpoint(folder / "checkpoint.pth.tar")
    assert state["step"] == LAST
    return {**state["state_dict"], "labels": state["method_state"]["labels"]}


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_steps_ends_with_the_same_weights(ranks: int, tmp_path: Path) -> None:
    size = str(16 // ranks)
    finish(tmp_path / "whole", ranks, size)
    seed = int.from_bytes(os.urandom(4), "big")
    chance = random.Random(seed)
    folder, killed = tmp_path / "killed", 0
    for step in sorted(chance.sample(range(2, LAST - 4), 2)):
        flags = [*FLAGS, size, "--checkpoint_minutes", "0", "--dump_path", str(folder)]
        launched = Launched("main_deepclusterv2.py", *flags, ranks=ranks)
        wait_for_step(folder, step, launched)
        time.sleep(chance.random() * 0.02)
        launched.send(signal.SIGKILL)
        codes, _ = launched.wait()
        killed += -signal.SIGKILL in codes
    assert killed > 0, "every run ended before it was killed: nothing was tested"
    assert "resuming at epoch" in finish(folder, ranks, size)
    ours = ended(folder)
    for name, value in ended(tmp_path / "whole").items():
        assert torch.equal(ours[name], value), f"{name} differs (random seed {seed})"


def test_a_run_of_two_ranks_continues_on_one(tmp_path: Path) -> None:
    """Over the end of the epoch, so that the memory of both ranks is clustered: same labels, same losses."""
    begun = tmp_path / "begun"
    flags = [*FLAGS, "8", "--checkpoint_minutes", "0", "--epochs", "9", "--dump_path", str(begun)]
    launched = Launched("main_deepclusterv2.py", *flags, ranks=2)
    wait_for_step(begun, 16, launched)
    launched.send(signal.SIGTERM)
    codes, printed = launched.wait()
    assert codes == [75, 75], printed
    start = read_checkpoint(begun / "checkpoint.pth.tar")["step"]
    losses = {}
    for ranks, size in ((1, "16"), (2, "8")):
        folder = tmp_path / f"on{ranks}"
        shutil.copytree(begun, folder)
        flags = [*FLAGS, size, "--epochs", "9", "--dump_path", str(folder)]
        codes, printed = Launched("main_deepclusterv2.py", *flags, ranks=ranks).wait()
        assert codes == [0] * ranks, printed
        losses[ranks] = {record["step"]: record["loss"] for record in metrics(folder) if "step" in record}
    for step in range(start + 1, start + 3):
        assert abs(losses[1][step] - losses[2][step]) < 1e-4 < abs(losses[1][step] - losses[1][step - 1])


def refused(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The one line that the script ends with."""
    monkeypatch.setattr(sys, "argv", ["main_deepclusterv2.py", *FLAGS, "16", "--dump_path", str(folder), *words])
    with pytest.raises(SystemExit) as end:
        cfg.entry(main_deepclusterv2.main)
    line = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "\n" not in line and not folder.exists(), line
    return line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--nmb_prototypes 97", "--crops_for_assign names 2 crops, --nmb_prototypes has layers for only 1"),
        ("--nmb_prototypes 12 97", "--nmb_prototypes 97: there are only 96 images in an epoch to cluster"),
        ("--crops_for_assign 0 3", "--crops_for_assign 0 3: there are 3 crops, use numbers 0 to 2"),
        ("--nmb_prototypes 12 1", "--nmb_prototypes 12 1: must be at least 2"),
        ("--temperature 0", "--temperature 0.0: must be above 0, such as 0.1"),
        ("--kmeans_iters 0", "--kmeans_iters 0: must be at least 1"),
        ("--kmeans_backend faiss", "--kmeans_backend faiss: faiss cannot be imported"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert said in refused(words.split(), tmp_path / "run", capsys, monkeypatch)


def test_refuses_the_checkpoint_of_other_heads(tmp_path: Path) -> None:
    finish(tmp_path, 1, "16", "--epochs", "1")
    flags = [*FLAGS, "16", "--nmb_prototypes", "12", "9", "--dump_path", str(tmp_path)]
    codes, printed = Launched("main_deepclusterv2.py", *flags).wait()
    assert codes == [2] and "nmb_prototypes" in printed and len(printed.strip().splitlines()) == 1, printed
