"""Fixed edge filters before the seeds' trunks and before any other network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate

from clusterssl.errors import UserError
from clusterssl.models.build import build_backbone, check_crop_sizes
from clusterssl.models.published import published_arch
from clusterssl.models.sobel import Sobel, see_edges
from tests.models.golden import FIXED


def edges_of(images: torch.Tensor) -> np.ndarray:
    """Sobel filters of the mean colour, by scipy."""
    grey = images.numpy().mean(1)
    kernels = FIXED["1.weight"][:, 0]
    return np.stack([[correlate(g, k, mode="constant") for k in kernels] for g in grey])


def test_filters_have_the_published_names_and_values_and_are_not_trained() -> None:
    sobel = Sobel()
    assert not list(sobel.parameters())
    state = sobel.double().state_dict()
    assert state.keys() == FIXED.keys()
    assert all(np.array_equal(state[name].numpy(), value) for name, value in FIXED.items())
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    np.testing.assert_allclose(sobel(x), edges_of(x), atol=1e-6)


@pytest.mark.parametrize("arch", ["conv4w8", "resnet18", "mobilenet_v3_small", "timm:resnet18"])
def test_any_network_sees_edges_and_keeps_its_names(arch: str) -> None:
    if arch.startswith("timm:"):
        pytest.importorskip("timm")
    backbone, colour = build_backbone(f"sobel:{arch}", "small"), build_backbone(arch, "small")
    assert backbone.arch_name == f"sobel:{arch}" and backbone.feature_dim == colour.feature_dim
    state, expected = backbone.state_dict(), colour.state_dict()
    assert list(state) == list(expected)
    assert [n for n in state if state[n].shape != expected[n].shape] == [next(iter(expected))]
    seen: list[torch.Tensor] = []
    first = next(m for m in backbone.modules() if isinstance(m, torch.nn.Conv2d))
    first.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.randn(2, 3, 32, 32)
    backbone.eval()(x)
    np.testing.assert_allclose(seen[0], edges_of(x), atol=1e-5)


def test_networks_that_see_edges_copy_move_and_train() -> None:
    backbone = build_backbone("sobel:conv4w8")
    again = copy.deepcopy(backbone).double()
    x = torch.randn(2, 3, 16, 16)
    again(x.double()).sum().backward()
    assert again.conv1.weight.grad.shape == (8, 2, 3, 3) and backbone.conv1.weight.grad is None
    shifted = x + 3.0  # a constant has no edges inside the image
    inner = backbone.eval().conv1(x)[..., 2:-2, 2:-2]
    torch.testing.assert_close(backbone.conv1(shifted)[..., 2:-2, 2:-2], inner, rtol=1e-4, atol=1e-4)
    check_crop_sizes(backbone, [(32, 32)])


def test_a_network_without_convolution_of_colours_is_refused() -> None:
    with pytest.raises(UserError, match="--sobel: mixer has no first convolution"):
        see_edges(torch.nn.Sequential(torch.nn.Linear(3, 4)), "mixer")
    with pytest.raises(UserError, match="unknown architecture"):
        build_backbone("sobel:")


@pytest.mark.parametrize(
    ("system", "arch", "sobel", "expected"),
    [
        ("deepcluster", "alexnet", True, "sobel:deepcluster_alexnet"),
        ("deepcluster", "vgg16", False, "deepcluster_vgg16"),
        ("deepcluster", "resnet50", True, "sobel:resnet50"),
        ("sela", "alexnet", False, "sela_alexnet"),
        ("sela", "alexnet_small", False, "sela_alexnet_small"),
        ("sela", "resnetv2", False, "sela_resnetv2"),
        ("sela", "sobel:conv4", True, "sobel:conv4"),
        ("swav", "alexnet", False, "alexnet"),
    ],
)
def test_what_published_flags_mean(system: str, arch: str, sobel: bool, expected: str) -> None:
    assert published_arch(system, arch, sobel) == expected
    with torch.device("meta"):
        assert build_backbone(expected).arch_name == expected


def test_fixed_input_size_is_refused_in_one_line() -> None:
    with torch.device("meta"):
        backbone = build_backbone("deepcluster_alexnet")
    with pytest.raises(UserError, match="deepcluster_alexnet cannot take crops of 96x96"):
        check_crop_sizes(backbone, [(224, 224), (96, 96)])
