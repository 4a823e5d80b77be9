"""VOC classification: what is trained, how a step goes, two ranks, and support vector machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from clusterssl import dist
from clusterssl.data.views import CentreCrop, RandomSquare
from clusterssl.errors import UserError
from clusterssl.evals.average_precision import class_precisions
from clusterssl.evals.svm import SvmOptions, svm_precisions, svm_table
from clusterssl.evals.voc import (
    CountedDropout,
    VocNet,
    VocStep,
    multilabel_loss,
    summed_outputs,
    train_step,
    training_steps,
)
from clusterssl.evals.vocdevkit import read_labels, voc_folder
from clusterssl.models.trunks import ConvTrunk
from tests.evals.voc import tiny_voc
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def trunk() -> ConvTrunk:
    """A network of DeepCluster's build, tiny: a convolution with BatchNorm, dropout and two linear layers."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
    classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 10))
    network = ConvTrunk(features, classifier, sobel=False)
    network.feature_dim = 10
    return network


def changed(train_batchnorm: bool, fc6_8: bool) -> set[str]:
    """Names of what three steps change."""
    net = VocNet(trunk(), 3, seed=1)
    parameters = net.trained(fc6_8=fc6_8, train_batchnorm=train_batchnorm)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    images, labels = torch.randn(6, 3, 16, 16), torch.randint(0, 2, (6, 3))
    for number in range(3):
        train_step(net, parameters, optimizer, number, VocStep(images, torch.arange(6), 6), labels)
    return {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}


def test_what_is_trained() -> None:
    linear = {f"trunk.classifier.{i}.{kind}" for i in (1, 4) for kind in ("weight", "bias")}
    linear |= {"top.weight", "top.bias"}
    norm = {"trunk.features.1.weight", "trunk.features.1.bias"}
    assert changed(False, True) == linear
    assert changed(True, True) == linear | norm
    everything = linear | norm | {"trunk.features.0.weight", "trunk.features.0.bias"}
    assert changed(False, False) == everything, "running statistics stay"


def test_new_layers_start_as_published() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Dropout(), nn.Linear(4, 3000), nn.ReLU(), nn.Dropout(), nn.Linear(3000, 10))
    network = ConvTrunk(nn.Sequential(nn.Conv2d(3, 4, 3)), wide, sobel=False)
    network.feature_dim = 10
    net = VocNet(network, 20, seed=3)
    for layer in net.linears():
        assert float(layer.weight.detach().std()) == pytest.approx(0.01, rel=0.05) and (layer.bias == 0.1).all()
    assert (net.top.bias == 0.1).all() and 0.9 * 10**-0.5 < float(net.top.weight.detach().abs().max()) <= 10**-0.5
    resnet = nn.Linear(3, 7)
    resnet.feature_dim = 7  # type: ignore[assignment]
    assert VocNet(resnet, 2).linears() == []


def test_the_last_relu_of_the_published_trunks_is_applied() -> None:
    net = VocNet(trunk(), 3).eval().requires_grad_(False)
    net.linears()[-1].bias.copy_(torch.linspace(-0.1, 0.1, 10))
    images = torch.randn(5, 3, 16, 16)
    features = net.trunk(images)
    assert (features < 0).any()
    torch.testing.assert_close(net(images), features.clamp(min=0) @ net.top.weight.T + net.top.bias)


def test_loss_leaves_ignored_labels_out() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    labels = torch.tensor([[1, 255], [0, 1]], dtype=torch.uint8)
    expected = -np.log(1 / (1 + np.exp(-2.0))) - np.log(1 - 1 / (1 + np.exp(-0.5))) - np.log(1 / (1 + np.exp(-3.0)))
    assert float(multilabel_loss(logits, labels)) == pytest.approx(expected, abs=1e-6)


def test_dropout_is_dropout_and_counted() -> None:
    layer = CountedDropout(0.3, seed=1, layer=2).train()
    layer.step, layer.index = 5, np.arange(40)
    x = torch.ones(40, 1000)
    once = layer(x)
    assert float((once == 0).double().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(once.max()) == pytest.approx(1 / 0.7)
    assert torch.equal(layer(x), once)
    layer.index = np.array([7])
    assert torch.equal(layer(x[:1]), once[7:8]), "an image's mask does not depend on the others"
    layer.step = 6
    assert not torch.equal(layer(x[:1]), once[7:8])
    assert torch.equal(layer.eval()(x), x)


def test_a_step_is_sgd_on_the_mean_with_clipped_gradients() -> None:
    torch.manual_seed(1)
    net = VocNet(_flat(nn.Linear(12, 6)), 2)
    twin = VocNet(_flat(nn.Linear(12, 6)), 2)
    twin.load_state_dict(net.state_dict())
    images, labels = 300 * torch.randn(4, 3, 2, 2), torch.tensor([[0, 1], [1, 255], [1, 1], [0, 0]])
    parameters = net.trained(fc6_8=False, train_batchnorm=False)
    loss = train_step(
        net, parameters, torch.optim.SGD(parameters, lr=0.1), 0, VocStep(images, torch.arange(4), 4), labels
    )
    expected = multilabel_loss(twin(images), labels) / 4
    expected.backward()
    norm = float(torch.stack([p.grad.norm() for p in twin.parameters()]).norm())
    assert norm > 10 and float(loss) == pytest.approx(expected.item(), rel=1e-6)
    for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other - 0.1 * other.grad * 10 / norm, rtol=1e-4, atol=1e-6)


def _flat(linear: nn.Linear) -> nn.Module:
    flat = nn.Sequential(nn.Flatten(), linear)
    flat.feature_dim = 6  # type: ignore[assignment]
    return flat


def training(root: str, batch_size: int) -> dict[str, Any]:
    """State after two epochs and the scores of the test images; batch_size counts all ranks."""
    folder = voc_folder(root)
    train, test = read_labels(folder, "trainval"), read_labels(folder, "test")
    net = VocNet(trunk(), 3, seed=2).double()
    parameters = net.trained(fc6_8=False, train_batchnorm=True)
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    cut, loading = RandomSquare((16, 16), (0.3, 1.0), seed=2), {"workers": 0, "device": CPU, "std": (0.2, 0.2, 0.2)}
    labels = torch.from_numpy(train.labels_NC)
    total = 2 * -(-len(train.images) // batch_size)
    steps = training_steps(train.images, cut, 0, total, batch_size=batch_size // dist.size(), seed=4, **loading)  # type: ignore[arg-type]
    losses = []
    for number, step in enumerate(steps):
        step = step._replace(views=None if step.views is None else step.views.double())
        losses.append(float(train_step(net, parameters, optimizer, number, step, labels)))
    scores = summed_outputs(_Doubled(net), test.images, 3, cut, (7, 8), **loading)  # type: ignore[arg-type]
    return {"losses": losses, "scores": scores.numpy(), "state": [t.numpy() for t in net.state_dict().values()]}


class _Doubled(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double())


def on_a_rank(rank: int, world_size: int, root: str) -> list[Any]:
    return [training(root, 10), training(root, 22), machines(3)]


def machines(shots: int) -> Any:
    x, labels = points(), (np.arange(80)[:, None] % 4 == np.arange(4)).astype(np.uint8)
    labels[5, 0] = 255
    return svm_precisions(
        x[:50], labels[:50], x[50:], labels[50:], shots=shots, draw=1, costs=(0.1, 1.0, 10.0), seed=5
    )  # fmt: skip


def points() -> np.ndarray:
    random = np.random.default_rng(0)
    return random.normal(size=(4, 6))[np.arange(80) % 4] + random.normal(size=(80, 6))


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """23 images are two steps of 10 and one of 3, or one of 22 and one of a single image, which one rank lacks."""
    root = str(tiny_voc(tmp_path, {"trainval": 23, "test": 15}))
    alone, both = on_a_rank(0, 1, root), run_ranks(on_a_rank, 2, root)
    for found in both:
        for mine, expected in zip(found[:2], alone[:2], strict=True):
            assert mine["losses"] == pytest.approx(expected["losses"], abs=1e-9)
            np.testing.assert_allclose(mine["scores"], expected["scores"], atol=1e-9)
            for a, b in zip(mine["state"], expected["state"], strict=True):
                np.testing.assert_allclose(a, b, atol=1e-9)
        np.testing.assert_allclose(found[2], alone[2], atol=1e-12)
    assert alone[0]["losses"][0] > alone[0]["losses"][-1]


def test_steps_continue_anywhere(tmp_path: Path) -> None:
    images = read_labels(voc_folder(tiny_voc(tmp_path)), "trainval").images
    cut, loading = RandomSquare((8, 8), (0.3, 1.0), seed=2), {"workers": 0, "device": CPU, "std": (0.2, 0.2, 0.2)}
    whole = list(training_steps(images, cut, 0, 9, batch_size=7, seed=4, **loading))  # type: ignore[arg-type]
    assert [step.total for step in whole] == [7, 7, 7, 3] * 2 + [7]
    assert sorted(torch.cat([step.index for step in whole[4:8]]).tolist()) == list(range(24))
    for start in (3, 5, 8):
        for step, expected in zip(
            training_steps(images, cut, start, 9, batch_size=7, seed=4, **loading),
            whole[start:],
            strict=True,  # type: ignore[arg-type]
        ):
            assert torch.equal(step.index, expected.index) and torch.equal(step.views, expected.views)


def test_outputs_are_in_the_order_of_the_images(tmp_path: Path) -> None:
    images = read_labels(voc_folder(tiny_voc(tmp_path)), "test").images
    cut = CentreCrop((24, 24), 24)
    found = summed_outputs(nn.Flatten(), images, 3 * 24 * 24, cut, workers=0, device=CPU, std=(0.5, 0.5, 0.5))
    for i in range(len(images)):
        pixels = cut(images.load(i), 0, i)[0].double() / 255
        expected = (pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / 0.5
        torch.testing.assert_close(found[i], expected.flatten(), atol=1e-5, rtol=0)


def test_machines_equal_scikit_learn_on_unit_features() -> None:
    x, labels = points(), (np.arange(80)[:, None] % 4 == np.arange(4)).astype(np.uint8)
    found = svm_precisions(x[:50], labels[:50], x[50:], labels[50:], shots=0, draw=0, costs=(2.0,), seed=0)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for c in range(4):
        machine = LinearSVC(C=2.0, class_weight={0: 1, 1: 2}, dual=False, tol=1e-8).fit(unit[:50], labels[:50, c])
        expected = class_precisions(labels[50:, c : c + 1], machine.decision_function(unit[50:])[:, None])
        assert found[0, c] == pytest.approx(float(expected[0]), abs=0.02)
    assert found.mean() > 0.5 and found.shape == (3, 4)


def test_table_of_machines() -> None:
    x, labels = points(), (np.arange(80)[:, None] % 4 == np.arange(4)).astype(np.uint8)
    options = SvmOptions(svm_shots=(1, 8, 0), svm_draws=4, svm_costs=(0.1, 1.0))
    one, eight, every = svm_table(x[:50], labels[:50], x[50:], labels[50:], options, seed=1)
    assert one["map"] < eight["map"] < every["map"] + 5 and one["map_std"] > 0 == every["map_std"]
    assert (one["shots"], one["draws"], every["draws"]) == (1, 4, 1)
    assert list(svm_table(x[:50], labels[:50], x[50:], labels[50:], options, seed=1)) == [one, eight, every]
    with pytest.raises(UserError, match="--svm_shots 30: class number 0 has 13 images that show it"):
        list(svm_table(x[:50], labels[:50], x[50:], labels[50:], SvmOptions(svm_shots=(30,)), seed=1))
