"""The published linear classifier: outputs, names, schedules, accuracy, training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clusterssl.errors import UserError
from clusterssl.evals.classifier import (
    LinearClassifier,
    Pooled,
    SyncedBatchNorm2d,
    epoch_order,
    evaluate_probes,
    rows_of_steps,
    steps_in_memory,
    train_epoch,
)
from clusterssl.evals.schedules import epoch_lr, step_lr
from clusterssl.models.build import build_backbone
from tests.models.golden import filled, images

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
CPU = torch.device("cpu")


def test_logits_of_the_three_published_variants() -> None:
    backbone = build_backbone("resnet50").double()
    backbone.load_state_dict(filled({key: tuple(value.shape) for key, value in backbone.state_dict().items()}))
    with np.load(GOLDEN / "networks_forward.npz") as arrays:
        for variant, (pooling, use_bn) in {
            "pool": (True, False), "spatial": (False, False), "spatial_bn": (False, True),
        }.items():  # fmt: skip
            with torch.no_grad():
                x = Pooled(backbone, global_pooling=pooling).eval()(images("swav224", 1, 3, 224, 224))
                assert x.shape[1:] == ((2048,) if pooling else (2048, 2, 2))
                classifier = LinearClassifier(x.shape[1:], 6, use_bn=use_bn).double().eval()
                shapes = {key: tuple(value.shape) for key, value in classifier.state_dict().items()}
                classifier.load_state_dict(filled(shapes))
                assert classifier(x).numpy() == pytest.approx(arrays[f"reglog_{variant}_eval_logits"], rel=1e-9)


def test_published_names_and_initialisation() -> None:
    names = ["bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
    classifier = LinearClassifier((2048, 2, 2), 1000, use_bn=True)
    assert list(classifier.state_dict()) == ["bn." + name[3:] for name in names] + ["linear.weight", "linear.bias"]
    assert tuple(classifier.linear.weight.shape) == (1000, 8192)
    assert float(classifier.linear.weight.detach().std()) == pytest.approx(0.01, rel=1e-2)
    assert not classifier.linear.bias.any()
    assert list(LinearClassifier((10240,), 1000, use_bn=True).state_dict()) == ["linear.weight", "linear.bias"]
    assert torch.equal(LinearClassifier((8,), 3, seed=4).linear.weight, LinearClassifier((8,), 3, seed=4).linear.weight)


def test_map_too_small_for_the_window() -> None:
    pooled = Pooled(build_backbone("conv4", "small"), global_pooling=False)
    assert pooled(torch.zeros(1, 3, 64, 64)).shape == (1, 128, 3, 3)
    with pytest.raises(UserError, match="--global_pooling false: needs a map of 6x6 or more, got 4x4"):
        pooled(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("kind", ["cosine", "step"])
def test_published_schedules(kind: str) -> None:
    with np.load(GOLDEN / "lr_schedules.npz") as arrays:
        params = json.loads(str(arrays[f"evallin_linear_{kind}_params"]))
        expected = arrays[f"evallin_linear_{kind}_lr"][:, 0]
    found = [
        epoch_lr(
            epoch, scheduler_type=kind, lr=params["lr"], epochs=params["epochs"], final_lr=params.get("final", 0),
            decay_epochs=params.get("decay", ()), gamma=params.get("gamma", 0),
        )
        for epoch in range(params["epochs"])
    ]  # fmt: skip
    assert found == pytest.approx(expected.tolist(), abs=1e-12)


def test_schedule_with_a_final_rate_equals_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.7)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9, eta_min=0.02)
    for epoch in range(9):
        found = epoch_lr(epoch, scheduler_type="cosine", lr=0.7, epochs=9, final_lr=0.02)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("percent", ["1", "10"])
def test_published_schedules_of_fine_tuning(percent: str) -> None:
    with np.load(GOLDEN / "lr_schedules.npz") as arrays:
        params = json.loads(str(arrays[f"evallin_semisup{percent}_params"]))
        expected = arrays[f"evallin_semisup{percent}_lr"]
    for column, name in enumerate(("lr", "lr2")):
        shape = {"epochs": params["epochs"], "decay_epochs": params["decay"], "gamma": params["gamma"]}
        found = [
            epoch_lr(epoch, scheduler_type="step", lr=params[name], **shape) for epoch in range(params["epochs"])
        ]  # fmt: skip
        assert found == pytest.approx(expected[:, column].tolist(), abs=1e-12)


@pytest.mark.parametrize("case", ["lincls_pub", "lincls_small"])
def test_published_schedules_of_selfclassifier(case: str) -> None:
    with np.load(GOLDEN / "lr_schedules.npz") as arrays:
        params, expected = json.loads(str(arrays[f"{case}_params"])), arrays[f"{case}_lr"]
    found = [epoch_lr(epoch, scheduler_type="cosine", **params) for epoch in range(params["epochs"])]
    assert found == pytest.approx(expected.tolist(), abs=1e-12)


def test_published_schedule_of_selas_probes() -> None:
    with np.load(GOLDEN / "lr_schedules.npz") as arrays:
        expected = arrays["selaprobe_lr"]
    found = [
        epoch_lr(epoch, scheduler_type="step", lr=0.01, epochs=36, decay_epochs=(10, 20, 30)) for epoch in range(36)
    ]  # fmt: skip
    assert found == pytest.approx(expected.tolist(), abs=1e-12)


@pytest.mark.parametrize("case", ["dclin_wd1e4", "dclin_wd1e7"])
def test_published_schedule_of_deepclusters_probes(case: str) -> None:
    with np.load(GOLDEN / "lr_schedules.npz") as arrays:
        params = json.loads(str(arrays[f"{case}_params"]))
        steps, expected = arrays[f"{case}_t"], arrays[f"{case}_lr"]
    found = [step_lr(int(step), lr=params["lr"], wd=params["weight_decay"]) for step in steps]
    assert found == pytest.approx(expected.tolist(), rel=1e-9)


def test_published_accuracy() -> None:
    with np.load(GOLDEN / "eval_metrics.npz") as arrays:
        logits, targets = torch.from_numpy(arrays["acc_logits"]), torch.from_numpy(arrays["acc_targets"])
        expected = arrays["acc_top1_top5_percent"]
    scores = evaluate_probes(torch.nn.Identity(), [(logits, targets)], CPU)[0]
    assert [scores.top1, scores.top5] == pytest.approx(expected, abs=1e-5)
    few = evaluate_probes(torch.nn.Identity(), [(torch.eye(3), torch.tensor([0, 1, 0]))], CPU)[0]
    assert [few.top1, few.top5] == pytest.approx([200 / 3, 100])


def test_batchnorm_equals_torch_alone() -> None:
    torch.manual_seed(0)
    ours, theirs = SyncedBatchNorm2d(5).double(), torch.nn.BatchNorm2d(5).double()
    theirs.weight.data.uniform_(0.5, 2)
    ours.load_state_dict(theirs.state_dict())
    for _ in range(3):
        x = 3 + 2 * torch.randn(7, 5, 2, 3, dtype=torch.float64)
        weights = torch.randn_like(x)
        results = [layer(x) for layer in (ours, theirs)]
        for result in results:
            (result * weights).sum().backward()
        assert torch.allclose(*results, atol=1e-12)
    assert torch.allclose(ours.weight.grad, theirs.weight.grad)
    for (name, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.allclose(mine, other), name


def data(shape: tuple[int, ...] = (6, 2, 2)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (53,), generator=generator)
    centres = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(53, *shape, generator=generator, dtype=torch.float64), labels


def test_an_epoch_equals_plain_torch() -> None:
    features, labels = data((6,))
    classifier, plain = (LinearClassifier((6,), 3, seed=2).double() for _ in range(2))
    optimizers = [
        torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01) for net in (classifier, plain)
    ]
    for epoch in range(3):
        order = epoch_order(53, 9, epoch)
        loss, top1, _ = train_epoch(classifier, optimizers[0], steps_in_memory(features, labels, order, 8), CPU)
        losses, right = [], 0
        for rows in order.split(8):
            logits = plain.linear(features[rows])
            losses.append(F.cross_entropy(logits, labels[rows], reduction="none").detach())
            right += int((logits.argmax(1) == labels[rows]).sum())
            optimizers[1].zero_grad()
            F.cross_entropy(logits, labels[rows]).backward()
            optimizers[1].step()
        assert loss == pytest.approx(float(torch.cat(losses).mean()))
        assert top1 == pytest.approx(100 * right / 53)
    assert torch.allclose(classifier.linear.weight, plain.linear.weight, atol=1e-12)


def test_every_image_once_per_epoch_in_another_order() -> None:
    orders = [epoch_order(53, 0, epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(torch.cat([rows for rows, _ in rows_of_steps(order, 8)]).tolist()) == list(range(53))
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[1], epoch_order(53, 0, 1))


def test_a_loss_that_is_not_finite_is_named() -> None:
    features, labels = data((6,))
    features[7] = float("inf")
    classifier = LinearClassifier((6,), 3).double()
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    with pytest.raises(UserError, match="training loss is not finite; lower --lr"):
        train_epoch(classifier, optimizer, steps_in_memory(features, labels, torch.arange(53), 8), CPU)
