"""Exported files give the same features in the libraries they are written for; optional libraries must be installed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from clusterssl.errors import UserError
from clusterssl.models.build import build_backbone, build_model
from clusterssl.models.export import FORMATS, export, usage, verify
from clusterssl.models.exported import Exported
from clusterssl.models.headed import build_headed
from clusterssl.models.network import Network
from clusterssl.models.selfclassifier import build_selfclassifier
from clusterssl.models.weights import backbone_from_weights, model_from_weights, read_weights
from tests.models.golden import filled, images


def exported(arch: str, stem: str = "imagenet", **more: object) -> Exported:
    """A backbone whose weights and statistics all differ."""
    return of(build_backbone(arch, stem), arch, stem, **more)


def of(backbone: nn.Module, arch: str, stem: str, **more: object) -> Exported:
    state = filled({name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()})
    backbone.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return Exported(backbone.eval().requires_grad_(False), arch, stem, name="net", **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def resnet50() -> Exported:
    return exported("resnet50")


@pytest.fixture(scope="module")
def photo() -> Tensor:
    return images("export", 2, 3, 224, 224).float()


def same_features(found: Tensor, source: Exported, photo: Tensor) -> None:
    expected = source.backbone(photo)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_torchvision_and_timm_load_it_strictly(resnet50: Exported, photo: Tensor, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs, other = export(resnet50, ["torchvision", "timm"], tmp_path)
    model = torchvision.models.resnet50()
    model.fc = nn.Identity()
    model.load_state_dict(torch.load(theirs, weights_only=True))
    same_features(model.eval()(photo), resnet50, photo)
    model = timm.create_model("resnet50", num_classes=0, checkpoint_path=str(other))
    same_features(model.eval()(photo), resnet50, photo)


@torch.no_grad()
def test_a_hub_folder_is_a_timm_model(resnet50: Exported, photo: Tensor, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    (folder,) = export(resnet50, ["huggingface"], tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    same_features(model.eval()(photo), resnet50, photo)
    assert model.pretrained_cfg["std"] == [0.229, 0.224, 0.225] and model.pretrained_cfg["crop_pct"] == 0.875
    front = (folder / "README.md").read_text().split("---")[1]
    assert "library_name: timm" in front and "license" not in front


class FrozenNorm(nn.Module):
    """BatchNorm of detectors: four constants, no counter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.running_mean[:, None, None], (self.running_var + 1e-5).sqrt()[:, None, None]
        return (x - mean) / deviation * self.weight[:, None, None] + self.bias[:, None, None]


@torch.no_grad()
def test_detr_loads_it_with_two_changed_lines(resnet50: Exported, photo: Tensor, tmp_path: Path) -> None:
    """As in its models/backbone.py, written anew."""
    (path,) = export(resnet50, ["detr"], tmp_path)
    backbone = torchvision.models.resnet50(
        replace_stride_with_dilation=[False, False, False], weights=None, norm_layer=FrozenNorm
    )
    missing, unexpected = backbone.load_state_dict(torch.load(path, weights_only=True), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    body = torchvision.models._utils.IntermediateLayerGetter(backbone, {"layer4": "0"})
    same_features(body(photo)["0"].mean((2, 3)), resnet50, photo)


class NormedConv(nn.Conv2d):
    """detectron2's convolution: the normalisation is inside."""

    def __init__(self, inside: int, outside: int, size: int, stride: int = 1) -> None:
        super().__init__(inside, outside, size, stride, size // 2, bias=False)
        self.norm = FrozenNorm(outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class DetectronBlock(nn.Module):
    def __init__(self, inside: int, inner: int, stride: int) -> None:
        super().__init__()
        self.shortcut = NormedConv(inside, 4 * inner, 1, stride) if stride > 1 or inside != 4 * inner else None
        self.conv1 = NormedConv(inside, inner, 1)
        self.conv2 = NormedConv(inner, inner, 3, stride)
        self.conv3 = NormedConv(inner, 4 * inner, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(self.conv2(self.conv1(x).relu()).relu())
        return (y + (x if self.shortcut is None else self.shortcut(x))).relu()


def detectron_resnet50() -> nn.Module:
    net, inside = nn.ModuleDict({"stem": nn.ModuleDict({"conv1": NormedConv(3, 64, 7, 2)})}), 64
    for stage, (number, inner) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        blocks = []
        for block in range(number):
            blocks.append(DetectronBlock(inside, inner, 2 if block == 0 and stage else 1))
            inside = 4 * inner
        net[f"res{stage + 2}"] = nn.Sequential(*blocks)
    return net


@torch.no_grad()
def test_detectron2_names(resnet50: Exported, photo: Tensor, tmp_path: Path) -> None:
    (path,) = export(resnet50, ["detectron2"], tmp_path)
    content = torch.load(path, weights_only=True)
    assert content["matching_heuristics"] is True and content["__author__"]
    net = detectron_resnet50()
    net.load_state_dict(content["model"])
    x = nn.functional.max_pool2d(net["stem"]["conv1"](photo).relu(), 3, 2, 1)
    for stage in range(2, 6):
        x = net[f"res{stage}"](x)
    same_features(x.mean((2, 3)), resnet50, photo)


def networks() -> dict[str, Network]:
    return {
        "swav": build_model("conv4w4", "small", 8, 4, 5),
        "deepclusterv2": build_model("conv4w4", "small", 8, 4, (5, 6)),
        "sela": build_headed("conv4w4", "small", (5, 6)),
        "selfclassifier": build_selfclassifier("conv4w4", "small", (7, 9), hidden_dim=8, dim=4),
    }


HEADS = [("onnx", "swav"), ("onnx", "selfclassifier")]  # some seconds each
HEADS += [(name, method) for name in ("torchscript", "safetensors") for method in networks()]


@pytest.mark.parametrize(("name", "method"), HEADS)
@torch.no_grad()
def test_heads_go_along(tmp_path: Path, name: str, method: str) -> None:
    if name == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    network = networks()[method]
    of(network, "conv4w4", "small")
    whole = Exported(network.backbone, "conv4w4", "small", (24, 24), network=network.eval())
    try:
        (path,) = export(whole, [name], tmp_path)
    except UserError as error:
        old = name == "onnx" and torch.__version__ < torch.torch_version.TorchVersion("2.7")
        pytest.skip(str(error)) if old and "cannot translate" in str(error) else pytest.fail(str(error))
    rows = images("rows", 5, 3, 24, 24).float()  # not the number of the example in the file
    read = FORMATS[name].load(whole, path)
    assert read is not None
    outputs = read(rows)
    assert len(outputs) == 1 + len(network.scores([rows]))
    torch.testing.assert_close(outputs[0], network.backbone(rows), atol=1e-5, rtol=1e-4)
    for found, expected in zip(outputs[1:], network.scores([rows]), strict=True):
        assert torch.equal(found.argmax(1), expected.argmax(1))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_torchscript_needs_torch_alone(tmp_path: Path) -> None:
    source = exported("sobel:conv4w4", "small", image_size=(24, 24))
    (path,) = export(source, ["torchscript"], tmp_path)
    rows = images("rows", 3, 3, 24, 24).float()
    torch.save(rows, tmp_path / "rows.pt")
    code = (
        "import sys, torch\n"
        f"x = torch.jit.load({str(path)!r})(torch.load({str(tmp_path / 'rows.pt')!r}))\n"
        f"torch.save(x, {str(tmp_path / 'features.pt')!r})\nassert 'clusterssl' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "features.pt"), source.backbone(rows))


def test_networks_only_we_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source = exported("conv4w4", "small", image_size=(24, 24), source="run/checkpoint.pth.tar")
    file, folder = export(source, ["safetensors", "huggingface"], tmp_path)
    card = file.with_name(file.name + ".md").read_text()
    assert "conv4w4, small stem" in card and "24 x 24" in card and "run/checkpoint.pth.tar" in card
    config = json.loads((folder / "config.json").read_text())
    assert 'clusterssl.hub.backbone("' in usage(source, "huggingface", folder) and "timm" not in caplog.text
    assert config["architecture"] == "conv4w4" and config["stem"] == "small" and config["num_features"] == 32


@pytest.mark.parametrize(
    ("arch", "names"),
    [("sela_resnetv1", ["torchvision", "detr"]), ("vit_tiny", ["timm"]), ("mobilenet_v3_small", ["torchvision"])],
)
def test_other_networks_under_other_libraries_names(tmp_path: Path, arch: str, names: list[str]) -> None:
    """`export` compares features itself."""
    if "timm" in names:
        pytest.importorskip("timm")
    for path in export(exported(arch), names, tmp_path):
        assert path.is_file()


def test_a_file_that_differs_is_noticed(tmp_path: Path) -> None:
    source = exported("resnet18")
    (path,) = export(source, ["torchvision"], tmp_path)
    assert verify(source, "torchvision", path) == 0
    state = torch.load(path, weights_only=True)
    state["layer3.1.bn2.running_mean"][5] += 0.5
    torch.save(state, path)
    with pytest.raises(RuntimeError, match="features of the written file differ"):
        verify(source, "torchvision", path)


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, out = exported("conv4w4", "small", image_size=(24, 24)), tmp_path / "out"
    for name, message in (
        ("torchvision", "torchvision has no network with the layers of conv4w4"),
        ("timm", "timm has no network"),
        ("detectron2", "the detector has no network"),
        ("detr", "take safetensors, huggingface, onnx or torchscript"),
        ("torchvison", "--format torchvison: choose among torchvision, timm"),
    ):
        with pytest.raises(UserError, match=message):
            export(small, ["torchscript", name], out)
    with pytest.raises(UserError, match="no network with the layers of resnet50 \\(small stem\\)"):
        export(Exported(nn.Identity(), "resnet50", "small"), ["torchvision"], out)
    network = networks()["swav"]
    with pytest.raises(UserError, match=r"--format torchvision --head: .* with heads go safetensors, onnx"):
        export(Exported(network.backbone, "resnet50", network=network), ["torchvision"], out)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="--format onnx: needs onnxscript; run pip install onnxscript"):
        export(small, ["onnx"], out)
    assert not out.exists()


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    source = exported("conv4w4", "small", image_size=(24, 24))
    (path,) = export(source, ["torchscript"], tmp_path)
    before = path.stat().st_mtime_ns
    with pytest.raises(UserError, match="exists already"):
        export(source, ["torchscript"], tmp_path)
    assert path.stat().st_mtime_ns == before
    export(source, ["torchscript"], tmp_path, overwrite=True)
    assert path.stat().st_mtime_ns > before and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output .* cannot be written"):
        export(source, ["torchscript"], tmp_path / "file")


def test_safetensors_are_read_as_any_checkpoint(tmp_path: Path) -> None:
    network = networks()["selfclassifier"]
    of(network, "conv4w4", "small")
    whole = Exported(network.backbone, "conv4w4", "small", (24, 24), name="net", network=network.eval())
    (path,) = export(whole, ["safetensors"], tmp_path)
    read = model_from_weights(str(path))
    for name, tensor in network.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name
    (folder,) = export(exported("resnet18"), ["huggingface"], tmp_path)
    assert backbone_from_weights(str(folder / "model.safetensors")).arch_name == "resnet18"
    assert read_weights(str(path))[1]["size_crops"] == [[24, 24]]
    assert read_weights(str(folder))[0].keys() == read_weights(str(folder / "model.safetensors"))[0].keys()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"a folder without checkpoint\.pth\.tar or"):
        read_weights(str(folder))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"net\.safetensors: not a readable safetensors file"):
        model_from_weights(str(path))
