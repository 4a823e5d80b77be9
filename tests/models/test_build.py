"""Networks by name, other libraries' networks, and the multi-crop forward."""

from __future__ import annotations

import copy
import logging
import sys

import pytest
import torch
import torchvision
from torch import Tensor, nn

from clusterssl.errors import UserError
from clusterssl.models.build import build_backbone, build_model, check_crop_sizes, resolve_stem


class Recorder(nn.Module):
    """Backbone that notes the batches it is given; its features are the mean colours."""

    feature_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape))
        return x.mean((2, 3))


def tiny(**kwargs: object) -> nn.Module:
    return build_model(
        **{"arch": "conv4w8", "stem": "small", "hidden_mlp": 12, "feat_dim": 6, "nmb_prototypes": 5} | kwargs
    )


@pytest.mark.parametrize(
    ("stem", "largest", "expected"),
    [
        ("auto", 32, "small"),
        ("auto", 64, "small"),
        ("auto", 65, "imagenet"),
        ("auto", 224, "imagenet"),
        ("small", 224, "small"),
        ("imagenet", 32, "imagenet"),
    ],
)
def test_resolve_stem(stem: str, largest: int, expected: str) -> None:
    assert resolve_stem(stem, largest) == expected


def test_unknown_stem_and_architecture_name_the_remedy() -> None:
    with pytest.raises(UserError, match="auto, imagenet or small"):
        resolve_stem("tiny", 32)
    with pytest.raises(UserError, match="auto, imagenet or small"):
        build_backbone("resnet18", "auto")
    with pytest.raises(UserError, match="nearest: resnet50") as error:
        build_backbone("resnet5O")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="unknown architecture"):
        build_backbone("")
    with pytest.raises(UserError, match="nearest"):
        build_backbone("timm:resnet50xx")


@pytest.mark.parametrize(
    "arch",
    ["mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "vit_b_16", "maxvit_t", "convnext_tiny", "googlenet"],
)
def test_torchvision_networks_lose_only_their_last_layer(arch: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(arch)
        options = {"aux_logits": False, "init_weights": True} if arch == "googlenet" else {}
        reference = torchvision.models.get_model(arch, weights=None, **options)
        assert backbone.eval()(torch.empty(2, 3, 224, 224)).shape == (2, backbone.feature_dim)
    lost = set(reference.state_dict()) - set(backbone.state_dict())
    assert lost and lost <= {f"{backbone.classifier_name}.weight", f"{backbone.classifier_name}.bias"}
    assert set(backbone.state_dict()) < set(reference.state_dict())


def test_torchvision_features_are_the_input_of_the_classifier() -> None:
    torch.manual_seed(0)
    reference = torchvision.models.mobilenet_v3_small(weights=None).eval()
    backbone = build_backbone("mobilenet_v3_small").eval()
    backbone.load_state_dict(reference.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(reference.classifier[-1](backbone(x)), reference(x))


def test_small_stem_of_torchvision_resnets_and_warning_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        backbone = build_backbone("resnext50_32x4d", "small")
        assert backbone.conv1.weight.shape == (64, 3, 3, 3) and backbone.stem_name == "small"
        assert backbone(torch.empty(2, 3, 32, 32)).shape == (2, 2048)
        with caplog.at_level(logging.WARNING):
            backbone = build_backbone("densenet121", "small")
    assert backbone.stem_name == "imagenet" and "densenet121" in caplog.text


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_timm_networks(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    backbone = build_backbone(f"timm:{name}").eval()
    reference = timm.create_model(name, num_classes=0).eval()
    reference.load_state_dict(backbone.state_dict(), strict=True)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), reference(x))
        assert backbone(torch.randn(2, 3, 96, 96)).shape == (2, backbone.feature_dim)


def test_absent_timm_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError) as error:
        build_backbone("timm:resnet18")
    assert str(error.value) == "--arch timm:resnet18: timm is not installed; run pip install timm"


def test_network_of_fixed_size_is_refused_before_the_run() -> None:
    with torch.device("meta"):
        fixed = build_backbone("vit_b_16")
    with pytest.raises(UserError, match=r"vit_b_16 cannot take crops of 96x96 \(it takes 224\); change --size"):
        check_crop_sizes(fixed, [(224, 224), (96, 96)])
    backbone = build_backbone("conv4w8")
    before = copy.deepcopy(backbone.state_dict())
    check_crop_sizes(backbone, [(32, 32), (8, 16)])
    assert backbone.training and all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())
    with pytest.raises(UserError, match=r"^--image_size: --arch conv4w8 .* 3x3 \(it takes 8 and more\); change --im"):
        check_crop_sizes(backbone, [(3, 3)], "--image_size")
    with pytest.raises(UserError, match="crops of 4x8"):
        check_crop_sizes(backbone, [(32, 32), (4, 8)])


def test_each_run_of_equal_crops_is_one_pass() -> None:
    model = tiny()
    model.backbone = Recorder()
    crops = [torch.randn(2, 3, h, w) for h, w in [(8, 8), (8, 8), (8, 4), (4, 8), (4, 8), (8, 8)]]
    features = model.features(crops)
    assert model.backbone.seen == [(4, 3, 8, 8), (2, 3, 8, 4), (4, 3, 4, 8), (2, 3, 8, 8)]
    torch.testing.assert_close(features, torch.cat([crop.mean((2, 3)) for crop in crops]))


def test_rows_are_crop_major_and_unit() -> None:
    model = tiny().eval()
    crops = [torch.randn(3, 3, 16, 16) for _ in range(2)] + [torch.randn(3, 3, 8, 8) for _ in range(2)]
    z_ND, scores_NK = model(crops)
    assert z_ND.shape == (12, 6) and scores_NK.shape == (12, 5)
    torch.testing.assert_close(z_ND.norm(dim=1), torch.ones(12))
    torch.testing.assert_close(scores_NK, z_ND @ model.prototypes.weight.T)
    for v, crop in enumerate(crops):
        for b in range(3):
            torch.testing.assert_close(model([crop[b : b + 1]])[0][0], z_ND[3 * v + b], rtol=1e-4, atol=1e-5)


def test_backbone_norms_see_one_size_and_head_norm_sees_all() -> None:
    model = tiny()
    model([torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16), torch.randn(4, 3, 8, 8)])
    assert model.backbone.bn1.num_batches_tracked == 2
    assert model.projection_head[1].num_batches_tracked == 1


def test_scores_are_float32_inside_autocast() -> None:
    model = tiny(nmb_prototypes=[5, 4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_ND, scores = model([torch.randn(4, 3, 16, 16)])
        assert model.backbone(torch.randn(4, 3, 16, 16)).dtype == torch.bfloat16
    assert z_ND.dtype == torch.float32 and [s.dtype for s in scores] == [torch.float32] * 2
    sum(s.square().sum() for s in scores).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("number", [5, (5, 4)])
def test_prototypes_become_unit(number: int | tuple[int, ...]) -> None:
    model = tiny(nmb_prototypes=number)
    model.normalize_prototypes()
    for layer in model.prototype_layers():
        torch.testing.assert_close(layer.weight.detach().norm(dim=1), torch.ones(layer.out_features))
        assert layer.weight.requires_grad


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_mlp": -1},
        {"feat_dim": -1},
        {"nmb_prototypes": -3},
        {"nmb_prototypes": [3, 0]},
        {"nmb_prototypes": [-3]},
    ],
)
def test_impossible_sizes(sizes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(sizes))}"):
        tiny(**sizes)


def test_no_head_and_no_prototypes() -> None:
    model = tiny(feat_dim=0, nmb_prototypes=4).eval()
    z_ND, scores_NK = model([torch.randn(2, 3, 16, 16)])
    assert z_ND.shape == (2, 64) and scores_NK.shape == (2, 4)
    assert tiny(nmb_prototypes=0)([torch.randn(2, 3, 16, 16)])[1] == []


def test_networks_can_be_copied() -> None:
    model = tiny().eval()
    crops = [torch.randn(2, 3, 16, 16)]
    torch.testing.assert_close(copy.deepcopy(model)(crops)[1], model(crops)[1])
