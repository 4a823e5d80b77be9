from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.batchnorm import synchronise
from clusterssl.checkpoint import distribute
from clusterssl.cluster.rounds import ClusteringOptions
from clusterssl.dist import World
from clusterssl.models.headed import HeadedNet
from clusterssl.optim import build_optimizer
from main_deepcluster import ALIASES, DIGITS, Config, DeepCluster, make_model, parameter_groups
from tests.feeds import GivenFeed
from tests.golden_files import FOLDER
from tests.launch import ROOT
from tests.ranks import run_ranks

PUBLISHED = json.loads((FOLDER / "published_deepcluster.json").read_text())


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


@pytest.fixture
def given(tmp_path: Path) -> tuple[DeepCluster, Tensor]:
    """The method on 60 rows that are their own features but for one weight each, and the rows."""
    net = HeadedNet(Given(), [6], relu_before_heads=True, head_std=0.01)
    x = torch.randn(60, 5, 1, 1, generator=torch.Generator().manual_seed(0))
    feed = GivenFeed(num_images=60, images=[(x, torch.arange(60))], labels=torch.full((60,), -1))
    config = small()
    return DeepCluster(net, replace(config, run=replace(config.run, dump_path=str(tmp_path))), feed), x


def one_step(method: DeepCluster, x: Tensor) -> Tensor:
    loss = method.loss([x], torch.arange(60))
    loss.backward()
    method.before_step(0)
    method.optimizer.step()
    method.optimizer.zero_grad()
    return loss.detach()


def test_steps_are_those_of_the_published_optimisers(given: tuple[DeepCluster, Tensor]) -> None:
    """Cross-entropy of the top layer over relu(features); momentum for the trunk only; a new layer each round."""
    method, x = given
    net = method.net
    method.optimizer = build_optimizer(parameter_groups(net, small()), "sgd", 0.5, 0.01)
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
            torch.testing.assert_close(one_step(method, x), expected.detach())
            with torch.no_grad():
                velocity = 0.9 * velocity + grads[0] + 0.01 * w
                w = w - 0.5 * velocity
                top, bias = (p - 0.5 * (g + 0.01 * p) for p, g in zip((top, bias), grads[1:], strict=True))
            torch.testing.assert_close(net.backbone.weight.detach(), w)
            torch.testing.assert_close(net.top_layer.weight.detach(), top)
            torch.testing.assert_close(net.top_layer.bias.detach(), bias)


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_no_optimiser_remembers_the_old_top_layer(given: tuple[DeepCluster, Tensor], name: str) -> None:
    method, x = given
    method.optimizer = build_optimizer(parameter_groups(method.net, small()), name, 0.1, 0.0)
    for epoch in range(2):
        method.begin_epoch(epoch)
        assert not any(p in method.optimizer.state for p in method.top_layer.parameters())
        assert (method.net.backbone.weight in method.optimizer.state) == (epoch > 0)
        one_step(method, x)
        assert all(p in method.optimizer.state for p in method.top_layer.parameters())


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
        words = shlex.split(script.replace("\\\n", " ").split("main_deepcluster.py", 2)[-1])
        ours = parsed([word for word in words if word != "$@"])
        place = replace(ours, data=replace(ours.data, data_path="${DIR}"), run=replace(ours.run, dump_path="${EXP}"))
        assert place == replace(published, model=replace(published.model, arch=arch))
        assert script.startswith("#!/bin/bash\n#SBATCH") and "Published result: " in script
    net = make_model(replace(published, clustering=replace(published.clustering, nmb_cluster=7)))
    assert net.record()["arch"] == "sobel:deepcluster_alexnet"
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["top_layer.weight", "top_layer.bias"]
