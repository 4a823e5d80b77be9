"""ResNets against torchvision's, and what torchvision does not have: the small stem."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from clusterssl.models.build import build_backbone
from clusterssl.models.resnet import RESNETS, resnet, shape_of


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("training", [True, False])
def test_equals_torchvision_with_the_same_weights(arch: str, training: bool) -> None:
    torch.manual_seed(0)
    reference = torchvision.models.get_model(arch, weights=None).double().train(training)
    reference.fc = nn.Identity()
    ours = resnet(arch).double().train(training)
    ours.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, 3, 65, 48, dtype=torch.float64)
    torch.testing.assert_close(ours(x), reference(x), rtol=1e-10, atol=1e-10)
    for (name, buffer), other in zip(ours.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_gradients_equal_torchvision(arch: str) -> None:
    torch.manual_seed(0)
    reference = torchvision.models.get_model(arch, weights=None).double()
    reference.fc = nn.Identity()
    ours = resnet(arch).double()
    ours.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    ours(x).square().mean().backward()
    reference(x).square().mean().backward()
    for (name, p), other in zip(ours.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("arch", RESNETS)
def test_feature_dim_and_names(arch: str) -> None:
    with torch.device("meta"):
        model = build_backbone(arch)
        features = model(torch.empty(2, 3, 64, 64))
        names = list(torchvision.models.get_model(arch.split("w")[0], weights=None).state_dict())
    assert features.shape == (2, model.feature_dim)
    assert list(model.state_dict()) == [name for name in names if not name.startswith("fc.")]
    assert model.arch_name == arch


def test_every_name_has_a_shape_of_its_own() -> None:
    assert len({shape_of(arch) for arch in RESNETS}) == len(RESNETS)


def test_small_stem_keeps_the_resolution() -> None:
    model = build_backbone("resnet18", "small").eval()
    x = torch.randn(2, 3, 32, 32)
    assert model.conv1.weight.shape == (64, 3, 3, 3)
    assert model.forward_map(x).shape == (2, 512, 4, 4)
    torch.testing.assert_close(model(x), model.forward_map(x).mean((2, 3)))
    assert "maxpool" not in "".join(model.state_dict())


def test_channels_last_goes_through_and_agrees() -> None:
    model = build_backbone("resnet18").eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    assert model.forward_map(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
