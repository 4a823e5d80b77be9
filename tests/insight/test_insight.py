"""Ascent, answers, first filters, prototypes and attention against the same by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from clusterssl.errors import UserError
from clusterssl.insight import ascent
from clusterssl.insight.answers import attention, best_images, filter_pictures, prototype_neighbours
from clusterssl.insight.ascent import AscentOptions, ascend, picture
from clusterssl.insight.maps import first_convolution, usual_layers, watched
from clusterssl.models.build import build_backbone, build_model
from clusterssl.models.vit import ViT

SIZE = (24, 24)


def network(arch: str = "conv4w4") -> torch.nn.Module:
    torch.manual_seed(0)
    return build_backbone(arch, "small").eval().requires_grad_(False)


def same(x: torch.Tensor) -> torch.Tensor:
    return x - 0.5


@pytest.mark.parametrize("layer", ["conv1", "conv3", "conv4"])
def test_ascent_raises_what_it_climbs(layer: str) -> None:
    backbone, filters = network(), [0, 2, 3]
    options = AscentOptions(niter=60, lr=40.0)
    made, answers = ascend(backbone, layer, filters, SIZE, options, normalize=same, seed=1)
    reached = []
    for images in (ascent._noise(1, filters, SIZE), made):
        with torch.no_grad(), watched(backbone, layer) as seen:
            backbone(same(images / 255))
        mean = seen.raw_BChw.numpy().clip(min=0).mean((2, 3), dtype=np.float64)
        reached.append((mean - np.log(np.exp(mean).sum(1, keepdims=True)))[range(3), filters])
        np.testing.assert_allclose(answers[len(reached) - 1], mean[range(3), filters], atol=1e-6)
    assert (reached[1] > reached[0]).all() and (answers[1] > answers[0]).all()
    again, _ = ascend(backbone, layer, [2], SIZE, options, normalize=same, seed=1)
    np.testing.assert_allclose(again[0], made[1], atol=0.5)


def test_one_step_is_the_published_formula() -> None:
    """x + lr g / (|g| + 1e-8), then a Gaussian blur as scipy's; forward pass written out, in float64."""
    backbone = network().double()
    options = AscentOptions(niter=1, lr=3.0, sig=0.6, ascent_wd=1e-5)
    start = ascent._noise(4, [5], SIZE)
    assert abs(start.mean() - 128) < 2 and abs(start.std() - 20) < 1

    def gain(z: torch.Tensor) -> torch.Tensor:
        y = F.max_pool2d(backbone.bn1(backbone.conv1(z)), 2).relu()
        y = F.max_pool2d(backbone.bn2(backbone.conv2(y)), 2).relu()
        return y.mean((2, 3)).log_softmax(1)[0, 5] - 1e-5 * (z**2).sum()

    gradient = torch.autograd.functional.jacobian(gain, same(start.double() / 255))[0].numpy()
    moved = start.double()[0].numpy() + 3 * gradient / (np.sqrt((gradient**2).sum()) + 1e-8)
    expected = gaussian_filter(moved, (0, 0.6, 0.6), mode="mirror")
    made, _ = ascend(backbone.float(), "conv2", [5], SIZE, options, normalize=same, seed=4)
    np.testing.assert_allclose(made[0], expected, atol=0.01)


def test_picture_is_normalised_as_published() -> None:
    x = np.random.default_rng(0).normal(100, 30, (3, 5, 6))
    expected = np.clip((x - x.mean()) / (x.std() + 1e-5) * 0.1 + 0.5, 0, 1) * 255
    assert (picture(torch.from_numpy(x)) == expected.transpose(1, 2, 0).astype(np.uint8)).all()


@pytest.mark.parametrize("arch", ["conv4w4", "resnet18", "mobilenet_v3_small"])
def test_best_images_are_those_of_a_brute_force_sort(arch: str) -> None:
    backbone = network(arch)
    images = torch.randn(50, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    layer = usual_layers(backbone, (32, 32))[-1]
    batches = [(images[at : at + 7], torch.arange(at, min(at + 7, 50))) for at in range(0, 50, 7)]
    found = best_images(None, backbone, [layer], batches, 6)[layer]
    with torch.no_grad(), watched(backbone, layer) as seen:
        backbone(images)
        answers = np.maximum(seen.raw_BChw.numpy(), 0).mean((2, 3))
    order = np.argsort(-answers, axis=0, kind="stable")[:6]
    np.testing.assert_allclose(found.answers_CE.numpy().T, np.take_along_axis(answers, order, 0), atol=1e-5)
    spread = answers.std(0) + 1e-30
    sure = np.diff(-np.sort(-answers / spread, axis=0)[:7], axis=0).max(0) < -1e-3
    assert (found.positions_CE.numpy().T[:, sure] == order[:, sure]).all() and sure.any()


def test_best_images_of_clusters() -> None:
    torch.manual_seed(0)
    whole = build_model("conv4w4", "small", 16, 8, 5).eval()
    images = torch.randn(40, 3, 16, 16)
    found = best_images(
        whole, whole.backbone, [], [(images[:25], torch.arange(25)), (images[25:], torch.arange(25, 40))], 3
    )
    with torch.no_grad():
        scores = whole.scores([images])[0].numpy()
    assert (found["clusters"].positions_CE.numpy() == np.argsort(-scores, axis=0)[:3].T).all()


def test_first_filters_fill_the_range() -> None:
    weight = network("resnet18").conv1.weight.numpy()
    for shown, kernel in zip(filter_pictures(weight), weight, strict=True):
        expected = 255 * (kernel - kernel.min()) / (kernel.max() - kernel.min())
        assert np.abs(shown.transpose(2, 0, 1) - expected).max() <= 0.5 + 1e-4
        assert shown.min() == 0 and shown.max() == 255
    (edges,) = filter_pictures(np.arange(18, dtype=np.float32).reshape(1, 2, 3, 3))
    assert (edges[..., 0] == edges[..., 2]).all()
    assert first_convolution(network("sobel:alexnet")).in_channels == 2


def test_neighbours_of_prototypes() -> None:
    weight = np.random.default_rng(0).normal(size=(9, 4))
    cosine, near = prototype_neighbours(torch.from_numpy(weight), 3)
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    expected = unit @ unit.T - 9 * np.eye(9)
    assert (near == np.argsort(-expected, axis=1)[:, :3]).all()
    np.testing.assert_allclose(cosine, -np.sort(-expected, axis=1)[:, :3], atol=1e-6)


def test_attention_by_gradients_is_grad_cam() -> None:
    """For a network that pools its last map the gradient is known: the same weight everywhere, by hand."""
    torch.manual_seed(0)
    whole = build_model("conv4w4", "small", 0, 0, 5, normalize=False).eval().requires_grad_(False)
    images = torch.randn(3, 3, 24, 24)
    seen = attention(whole, images, "conv4")
    maps = whole.backbone.forward_map(images)
    winner = whole.scores([images])[0].argmax(1)
    # The score is w . mean(relu(map)): positions with a positive map have gradient w / hw, the others none.
    share = (maps > 0).float().mean((2, 3))
    expected = torch.relu(torch.einsum("bc,bchw->bhw", whole.prototypes.weight[winner] * share, maps))
    low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
    np.testing.assert_allclose(seen, (expected - low) / (high - low).clamp(min=1e-12), atol=1e-5)


def test_attention_of_a_transformer() -> None:
    torch.manual_seed(0)
    trunk = ViT(24, 3).eval()
    whole = build_model("conv4w4", "small", 0, 8, 5).eval()
    whole.backbone = trunk
    images = torch.randn(2, 3, 32, 48)
    seen = attention(whole, images, "")
    assert seen.shape == (2, 2, 3)
    inner: list[torch.Tensor] = []
    trunk.blocks[-1].norm1.register_forward_hook(lambda _m, _i, out: inner.append(out))
    with torch.no_grad():
        trunk(images)
    qkv = trunk.blocks[-1].attn.qkv(inner[0]).detach().numpy().reshape(2, 7, 3, 3, 8)
    weight = np.zeros((2, 6))
    for b in range(2):
        for h in range(3):
            score = qkv[b, 0, 0, h] @ qkv[b, :, 1, h].T / np.sqrt(8)
            chance = np.exp(score) / np.exp(score).sum()
            weight[b] += chance[1:] / 3
    low, high = weight.min(1, keepdims=True), weight.max(1, keepdims=True)
    np.testing.assert_allclose(seen.flatten(1), (weight - low) / (high - low), atol=1e-4)


def test_layers_that_give_no_map() -> None:
    backbone = network("resnet18")
    with pytest.raises(UserError, match="no such layer"), watched(backbone, "layer9"):
        pass
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 24 * 24, 4))
    with pytest.raises(UserError, match="no layer of this network"):
        usual_layers(backbone, SIZE)
    with pytest.raises(UserError, match="no convolution"):
        first_convolution(backbone)
