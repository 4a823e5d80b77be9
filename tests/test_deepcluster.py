from __future__ import annotations

import json
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import main_deepcluster
from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.batchnorm import synchronise
from clusterssl.checkpoint import distribute
from clusterssl.cluster.rounds import ClusteringOptions
from clusterssl.dist import World
from clusterssl.files import read_checkpoint
from clusterssl.models.weights import model_from_weights
from clusterssl.optim import build_optimizer
from main_deepcluster import ALIASES, DIGITS, Config, DeepCluster, make_model, parameter_groups
from tests.feeds import GivenFeed
from tests.golden_files import FOLDER
from tests.launch import ROOT, Launched, metrics, wait_for_step
from tests.ranks import run_ranks

PUBLISHED = json.loads((FOLDER / "published_deepcluster.json").read_text())
TINY = [
    *("--data_path", "synthetic:96:24x24", "--size_crops", "16", "--arch", "conv4w4", "--nmb_cluster", "12"),
    *("--pca_dim", "16", "--base_lr", "0.1", "--epochs", "4", "--workers", "0", "--log_freq", "1", "--device", "cpu"),
    *("--checkpoint_minutes", "0"),
]
PIC = ["--clustering", "PIC", "--pic_neighbours", "2"]
STEPS = 24


def small(**clustering: Any) -> Config:
    options = ClusteringOptions(nmb_cluster=6, pca_dim=8, **clustering)
    model = replace(DIGITS.model, arch="conv4w4", stem="small")
    return replace(DIGITS, model=model, clustering=options, optim=replace(DIGITS.optim, batch_size=24, base_lr=0.5))


def train(rank: int, world_size: int, config: Config, steps: int = 2) -> tuple[list[float], Tensor, dict[str, Tensor]]:
    """Losses, clusters and weights of a round and the steps after it, on 48 images in float64."""
    torch.manual_seed(0)
    net = synchronise(make_model(config).double(), "pytorch", 0, torch.device("cpu"))
    images = torch.rand(48, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    first, end = dist.share(48)
    batches = [(images[at : min(at + 7, end)], torch.arange(at, min(at + 7, end))) for at in range(first, end, 7)]
    feed = GivenFeed(num_images=48, seed=3, images=batches, labels=torch.arange(48) % 4)
    model = distribute(net, World(rank, world_size))
    with tempfile.TemporaryDirectory() as folder:
        method = DeepCluster(model, replace(config, run=replace(config.run, dump_path=folder)), feed)
        optim = config.optim
        method.optimizer = build_optimizer(parameter_groups(net, config), optim.optimizer, optim.base_lr, optim.wd)
        method.begin_epoch(0)
    model.train()
    losses = []
    for step, index in enumerate(method.order(0)[: 24 * steps].reshape(steps, 24)):
        mine = torch.from_numpy(index).chunk(world_size)[rank]
        loss = method.loss([images[mine]], mine)
        loss.backward()
        method.before_step(step)
        method.optimizer.step()
        method.optimizer.zero_grad()
        losses.append(float(loss.detach()))
    weights = {name.removeprefix("module."): value.detach() for name, value in model.state_dict().items()}
    return losses, method.clusters.labels_N, weights


CONFIGS = [small(), small(clustering="PIC", pic_neighbours=2)]


def train_both(rank: int, world_size: int) -> list[tuple[list[float], Tensor, dict[str, Tensor]]]:
    return [train(rank, world_size, config) for config in CONFIGS]


def test_two_ranks_equal_one_in_float64() -> None:
    """Features, PCA, clusters, new top layer, balanced order, loss, gradients and both parameter groups."""
    together = run_ranks(train_both, 2)
    for number, (losses, labels, weights) in enumerate(train_both(0, 1)):
        assert len(labels.unique()) > 2 and losses[0] != losses[1]
        parts = [both[number] for both in together]
        assert sum(np.asarray(part[0]) for part in parts) / 2 == pytest.approx(losses, abs=1e-9)
        for part in parts:
            assert torch.equal(part[1], labels)
            for name, expected in weights.items():
                torch.testing.assert_close(part[2][name], expected, rtol=0, atol=1e-9, msg=f"{name} differs")


class Given(nn.Module):
    """A backbone that hands on what it is given, through one weight."""

    feature_dim = 5

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) * self.weight


def test_a_step_is_that_of_the_published_optimisers() -> None:
    """Cross-entropy of the top layer over relu(features); momentum for the trunk only; a new layer each round."""
    config = small()
    net = main_deepcluster.HeadedNet(Given(), [6], relu_before_heads=True, head_std=0.01)
    x = torch.randn(60, 5, 1, 1, generator=torch.Generator().manual_seed(0))
    feed = GivenFeed(num_images=60, images=[(x, torch.arange(60))], labels=torch.full((60,), -1))
    with tempfile.TemporaryDirectory() as folder:
        method = DeepCluster(net, replace(config, run=replace(config.run, dump_path=folder)), feed)
        groups = parameter_groups(net, config)
        method.optimizer = torch.optim.SGD(groups, lr=0.5, momentum=0.9, weight_decay=0.01)
        velocity = torch.zeros(5)
        for epoch in range(2):
            method.begin_epoch(epoch)
            w, top, bias = (p.detach().clone() for p in (net.backbone.weight, *net.top_layer.parameters()))
            assert abs(float(top.std()) - 0.01) < 0.004 and not bias.any()
            labels = method.clusters.labels_N.long()
            for _ in range(2):
                leaves = [p.requires_grad_() for p in (w, top, bias)]
                scores = torch.relu(x.flatten(1) * w) @ top.T + bias
                expected = -scores.log_softmax(1)[torch.arange(60), labels].mean()
                grads = torch.autograd.grad(expected, leaves)
                loss = method.loss([x], torch.arange(60))
                torch.testing.assert_close(loss, expected)
                loss.backward()
                method.before_step(0)
                method.optimizer.step()
                method.optimizer.zero_grad()
                with torch.no_grad():
                    velocity = 0.9 * velocity + grads[0] + 0.01 * w
                    w = w - 0.5 * velocity
                    top, bias = (p - 0.5 * (g + 0.01 * p) for p, g in zip((top, bias), grads[1:], strict=True))
                torch.testing.assert_close(net.backbone.weight.detach(), w)
                torch.testing.assert_close(net.top_layer.weight.detach(), top)
                torch.testing.assert_close(net.top_layer.bias.detach(), bias)


def finish(folder: Path, ranks: int, *flags: str) -> str:
    words = [*TINY, "--batch_size", str(16 // ranks), *flags, "--dump_path", str(folder)]
    codes, printed = Launched("main_deepcluster.py", *words, ranks=ranks).wait()
    assert codes == [0] * ranks, printed
    return printed


def interrupted(folder: Path, ranks: int, step: int, number: signal.Signals, *flags: str) -> list[int]:
    words = [*TINY, "--batch_size", str(16 // ranks), *flags, "--dump_path", str(folder)]
    launched = Launched("main_deepcluster.py", *words, ranks=ranks)
    wait_for_step(folder, step, launched)
    time.sleep(random.random() * 0.03)
    launched.send(number)
    return launched.wait()[0]


@pytest.mark.parametrize(("ranks", "flags"), [(2, []), (1, PIC)], ids=["k-means", "PIC"])
def test_killed_and_resumed_ends_with_the_same_weights(ranks: int, flags: list[str], tmp_path: Path) -> None:
    finish(tmp_path / "whole", ranks, *flags)
    folder, killed = tmp_path / "killed", 0
    for step in (random.randrange(1, 10), random.randrange(11, 20)):
        killed += -signal.SIGKILL in interrupted(folder, ranks, step, signal.SIGKILL, *flags)
    assert killed > 0, "every run ended before it was killed: nothing was tested"
    assert "resuming at epoch" in finish(folder, ranks, *flags)
    expected, ours = (read_checkpoint(place / "checkpoint.pth.tar") for place in (tmp_path / "whole", folder))
    assert expected["step"] == STEPS
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in expected["state_dict"].items())
    assert torch.equal(ours["method_state"]["labels"], expected["method_state"]["labels"])
    rounds = [np.load(place / "clusters" / "epoch0003.npz")["labels"] for place in (tmp_path / "whole", folder)]
    assert (rounds[0] == rounds[1]).all()
    if flags:
        found = [int(np.load(path)["labels"].max()) + 1 for path in sorted((folder / "clusters").iterdir())]
        assert len(set(found)) > 1, "PIC found equally many clusters each time: nothing was tested"
        assert len(expected["state_dict"]["top_layer.bias"]) == found[-1]


def test_continues_on_another_number_of_ranks(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    assert interrupted(begun, 2, 14, signal.SIGTERM, "--epochs", "9") == [75, 75]
    start = read_checkpoint(begun / "checkpoint.pth.tar")["step"]
    losses = {}
    for ranks in (1, 2):
        folder = tmp_path / f"on{ranks}"
        shutil.copytree(begun, folder)
        finish(folder, ranks, "--epochs", "9")
        losses[ranks] = {record["step"]: record["loss"] for record in metrics(folder) if "step" in record}
    for step in range(start + 1, start + 3):
        assert abs(losses[1][step] - losses[2][step]) < 1e-4 < abs(losses[1][step] - losses[1][step - 1])


def test_a_network_rebuilt_from_the_checkpoint_predicts_clusters(tmp_path: Path) -> None:
    finish(tmp_path, 1, "--epochs", "1", "--sobel")
    net = model_from_weights(str(tmp_path / "checkpoint.pth.tar")).eval()
    ids = net.predict(torch.randn(5, 3, 16, 16))
    assert ids.dtype == torch.int64 and ids.max() < 12
    assert main_deepcluster.HeadedNet is type(net) and net.relu_before_heads


LOSSES = [
    *(1.7857, 1.8315, 1.7751, 1.6983, 1.7414, 1.7161, 1.5565, 1.4937, 1.6479, 1.9957),
    *(1.7897, 1.6421, 1.8688, 1.2530, 1.1360, 1.2298, 1.0376, 1.2104, 1.0293, 0.7894),
]
"""of two rounds of 10 steps, recorded when this test was written"""


def test_the_first_twenty_losses_are_the_recorded_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four well-spread components, so that no rounding of another processor moves an image to another cluster."""
    flags = "--nmb_cluster 6 --pca_dim 4 --base_lr 0.5 --epochs 2 --reassign 1.7 --batch_size 16"
    monkeypatch.setattr(sys, "argv", ["main_deepcluster.py", *TINY, *flags.split(), "--dump_path", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        cfg.entry(main_deepcluster.main)
    assert end.value.code == 0
    losses = [record["loss"] for record in metrics(tmp_path) if "step" in record]
    assert losses == pytest.approx(LOSSES, abs=2e-3)


def refused(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["main_deepcluster.py", *words])
    with pytest.raises(SystemExit) as end:
        cfg.entry(main_deepcluster.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and len(error.strip().splitlines()) == 1
    return error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--k 97", "--nmb_cluster 97: more clusters than the 96 images"),
        ("--clustering PIC --pic_neighbours 96", "--pic_neighbours 96: needs more than 96 images, there are 96"),
        ("--clustering kmeans", "Kmeans"),
        ("--nmb_clusters 5", "--nmb_clusters: unknown flag; did you mean --nmb_cluster?"),
        ("--reassign 0.05", "global batch of 16 images"),
        ("--momentum 1", "--momentum 1.0"),
        ("--wd -x", "--wd"),
    ],
)
def test_bad_input_is_one_line(
    flags: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words_given = [*TINY, "--batch_size", "16", "--dump_path", str(tmp_path / "run"), *flags.split()]
    error = refused(words_given, monkeypatch, capsys)
    assert words in error, error
    assert not (tmp_path / "run").exists()


def parsed(words: list[str]) -> Config:
    return cfg.parse(Config, cfg.translate(words, ALIASES, positional="data_path", powers=["wd"]))


def test_published_flags_and_defaults() -> None:
    ours = {flag.name: flag.default for flag in cfg.flags(parsed(["DIR"]))}
    assert ours["data_path"] == "DIR" and ours["nmb_crops"] == (1,) and ours["optimizer"] == "sgd"
    for flag in PUBLISHED["flags"]:
        for spelling in flag["flags"]:
            name = ALIASES.get(spelling.lstrip("-"), spelling.lstrip("-"))
            if name is None or not spelling.startswith("-"):
                continue
            switch = flag["action"] == "store_true"
            assert parsed([spelling] if switch else [spelling, str(flag["default"])])
            assert ours[name] == {"wd": 1e-5, "dump_path": "."}.get(name, flag["default"]), spelling


def test_published_command_line_parses_to_the_recipe() -> None:
    published = parsed(PUBLISHED["recipes"][0]["flags"])
    assert published.optim.wd == 1e-5 and published.clustering.nmb_cluster == 10000 and published.sobel
    for arch in ("alexnet", "vgg16"):
        script = (ROOT / "scripts" / f"deepcluster_{arch}.sh").read_text()
        ours = parsed(shlex.split(script.replace("\\\n", " ").split("main_deepcluster.py", 2)[-1]))
        place = replace(ours, data=replace(ours.data, data_path="${DIR}"), run=replace(ours.run, dump_path="${EXP}"))
        assert place == replace(published, model=replace(published.model, arch=arch))
        assert script.startswith("#!/bin/bash\n#SBATCH") and "Published result: " in script
    net = make_model(replace(published, clustering=replace(published.clustering, nmb_cluster=7)))
    assert net.record()["arch"] == "sobel:deepcluster_alexnet"
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["top_layer.weight", "top_layer.bias"]
