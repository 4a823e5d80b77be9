"""Feature extraction: order, modes, unreadable images, random crops; BatchNorm calibration."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from clusterssl.data import MEAN, STD, eval_batches, open_source
from clusterssl.evals.classifier import epoch_order
from clusterssl.evals.features import augmented_steps, calibrate_batchnorm, extract


class Flat(nn.Module):
    """Mean colour of the four quarters; says in which mode it ran."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def photo_tree(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee")):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 255, (9, 12, 3)).astype(np.uint8) // 2 + 100 * label
            Image.fromarray(pixels).resize((120 + 7 * i, 90)).save(folder / name / f"{i}.png")
    return folder


def test_features_equal_torchvision_pipeline_in_dataset_order(tmp_path: Path) -> None:
    source = open_source(str(photo_tree(tmp_path)))
    backbone = Flat().train()
    found, labels = extract(backbone, source, image_size=(70, 70), resize=80, batch_size=3)
    assert backbone.training and found.dtype == torch.float32
    pipeline = v2.Compose([
        v2.ToImage(), v2.Resize(80), v2.CenterCrop(70), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD),
    ])  # fmt: skip
    paths = sorted(tmp_path.glob("*/*.png"))
    expected = torch.cat([Flat().eval()(pipeline(Image.open(path))[None]) for path in paths])
    assert torch.allclose(found, expected, atol=0.02)
    assert labels.tolist() == [0] * 4 + [1] * 4


def test_unreadable_images_are_left_out_not_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(str(photo_tree(tmp_path)))
    whole, _ = extract(Flat(), source, image_size=(64, 64), batch_size=3)
    (tmp_path / "ant" / "1.png").write_bytes(b"no image")
    (tmp_path / "bee" / "3.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "clusterssl"):
        found, labels = extract(Flat(), source, image_size=(64, 64), batch_size=3)
    kept = [0, 2, 3, 4, 5, 6]
    assert torch.allclose(found, whole[kept], atol=1e-6)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "2 unreadable images left out" in caplog.text
    assert caplog.text.count("unreadable image: ") == 2


def steps(epoch: int, batch_size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    source = open_source("synthetic:11:24x24:3")
    made = augmented_steps(
        Flat().eval(), source, np.arange(11), epoch_order(11, 0, epoch), image_size=(16, 16), batch_size=batch_size,
        workers=0, device=torch.device("cpu"), seed=0, epoch=epoch,
    )  # fmt: skip
    return [(step.features, step.labels) for step in made]


def test_random_crops_depend_on_the_epoch_alone() -> None:
    labels = np.arange(11) % 3
    first = steps(0)
    assert [len(x) for x, _ in first] == [4, 4, 3]  # the incomplete step is kept
    order = epoch_order(11, 0, 0)
    assert torch.cat([y for _, y in first]).tolist() == labels[order].tolist()
    again, other = steps(0, batch_size=5), steps(1)
    assert torch.allclose(torch.cat([x for x, _ in first]), torch.cat([x for x, _ in again]), atol=1e-6)
    by_image = torch.empty(2, 11, 12)
    for i, made in enumerate((first, other)):
        by_image[i, epoch_order(11, 0, i)] = torch.cat([x for x, _ in made])
    assert ((by_image[0] - by_image[1]).abs().amax(1) > 1e-3).sum() >= 9


def test_calibration_gives_the_averages_over_the_data() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.1), nn.ReLU(), nn.Dropout(0.9))
    network[0].eval()
    modes = [module.training for module in network.modules()]
    weights = [p.clone() for p in network.parameters()]
    batches = [batch.images for batch in eval_batches(open_source("synthetic:32:12x12"), image_size=12, batch_size=8)]
    network[1].running_mean.fill_(7)
    calibrate_batchnorm(network, batches)
    with torch.no_grad():
        outputs = [network[0](images).transpose(0, 1).flatten(1) for images in batches]
    assert torch.allclose(network[1].running_mean, torch.stack([x.mean(1) for x in outputs]).mean(0), atol=1e-5)
    assert torch.allclose(network[1].running_var, torch.stack([x.var(1) for x in outputs]).mean(0), atol=1e-4)
    assert network[1].momentum == 0.1
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))
