"""torch.hub entry points: in a hostile process, from a local server, against the published names."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision

from clusterssl import hub
from clusterssl.errors import UserError
from clusterssl.models.build import MultiCropNet, build_model
from clusterssl.models.download import cache_path
from clusterssl.models.headed import build_headed
from clusterssl.models.weights import flat_state_dict, published_state_dict
from tests.models.server import serve

REPO = Path(__file__).resolve().parent.parent
PUBLISHED = "https://dl.fbaipublicfiles.com/deepcluster"
VARIANTS = {
    "resnet50": "swav_800ep_pretrain.pth.tar",
    "resnet50w2": "swav_RN50w2_400ep_pretrain.pth.tar",
    "resnet50w4": "swav_RN50w4_400ep_pretrain.pth.tar",
    "resnet50w5": "swav_RN50w5_400ep_pretrain.pth.tar",
    "swav_800ep": "swav_800ep_pretrain.pth.tar",
    "swav_400ep": "swav_400ep_pretrain.pth.tar",
    "swav_200ep": "swav_200ep_pretrain.pth.tar",
    "swav_100ep": "swav_100ep_pretrain.pth.tar",
    "swav_200ep_bs256": "swav_200ep_bs256_pretrain.pth.tar",
    "swav_400ep_bs256": "swav_400ep_bs256_pretrain.pth.tar",
    "swav_400ep_2x224": "swav_400ep_2x224_pretrain.pth.tar",
    "swav_RN50w2_400ep": "swav_RN50w2_400ep_pretrain.pth.tar",
    "swav_RN50w4_400ep": "swav_RN50w4_400ep_pretrain.pth.tar",
    "swav_RN50w5_400ep": "swav_RN50w5_400ep_pretrain.pth.tar",
    "deepclusterv2_800ep": "deepclusterv2_800ep_pretrain.pth.tar",
    "deepclusterv2_400ep": "deepclusterv2_400ep_pretrain.pth.tar",
    "deepclusterv2_400ep_2x224": "deepclusterv2_400ep_2x224_pretrain.pth.tar",
    "selav2_400ep": "selav2_400ep_pretrain.pth.tar",
    "selav2_400ep_2x224": "selav2_400ep_2x224_pretrain.pth.tar",
}

SELA = "http://www.robots.ox.ac.uk/~vgg/research/self-label/asset"
SEEDS = {
    "deepcluster_alexnet": f"{PUBLISHED}/alexnet/checkpoint.pth.tar",
    "deepcluster_vgg16": f"{PUBLISHED}/vgg16/checkpoint.pth.tar",
    "sela_resnet18_1k_pp": f"{SELA}/new_models/resnet18-1k_pp.pth",
    "sela_resnet50_1k_pp": f"{SELA}/new_models/resnet50-1k_pp.pth",
    "sela_resnet50_10x3k_pp": f"{SELA}/new_models/resnet50-10x3k_pp.pth",
}
BY_HAND = {
    "sela_resnetv2_10x3k": f"{SELA}/pretrained.zip",
    "sela_alexnet_10x3k": f"{SELA}/pretrained.zip",
    "selfclassifier_resnet50": "https://drive.google.com/drive/folders/1o8M1cSVnhsMsdiRejj0DweWs2mhtP57F",
}


@pytest.fixture(scope="module")
def swav(tmp_path_factory: pytest.TempPathFactory) -> tuple[MultiCropNet, Path]:
    """A file in the published format of ResNet-50, with a small head, and the network it holds."""
    torch.manual_seed(0)
    model = build_model("resnet50", "imagenet", 32, 16, 20).eval()
    path = tmp_path_factory.mktemp("site") / "swav.pth.tar"
    torch.save(published_state_dict(model), path, _use_new_zipfile_serialization=False)
    return model, path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    yield tmp_path / "hub" / "checkpoints"


def load(name: str, **kwargs: object) -> torch.nn.Module:
    return torch.hub.load(str(REPO), name, source="local", **kwargs)


def test_every_published_variant_is_listed_with_its_address() -> None:
    entries = runpy.run_path(str(REPO / "hubconf.py"))
    # The rule of torch.hub.list: every callable whose name does not begin with an underscore.
    names = {name for name, value in entries.items() if callable(value) and name[0] != "_"}
    assert names == {*VARIANTS, *SEEDS, *BY_HAND, "backbone", "network"}
    assert entries["dependencies"] == ["torch", "torchvision"]
    for name, file in VARIANTS.items():
        assert f"{PUBLISHED}/{file}" in (getattr(hub, name).__doc__ or ""), name
        assert getattr(hub, name).__name__ == name
    for name, address in (SEEDS | BY_HAND).items():
        assert address in (getattr(hub, name).__doc__ or ""), name
        assert getattr(hub, name).__name__ == name


@pytest.mark.parametrize("name", BY_HAND)
def test_weights_without_an_address_are_named_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: .*weights=PATH") as error:
        load(name)
    assert BY_HAND[name] in str(error.value) and "\n" not in str(error.value)
    with torch.device("meta"):
        assert load(name, pretrained=False)(torch.empty(1, 3, 224, 224)).shape[0] == 1


def test_files_of_one_name_do_not_meet_in_the_cache() -> None:
    paths = {cache_path(address) for address in SEEDS.values()}
    assert len(paths) == len(SEEDS)


def test_published_network_predicts_clusters(cache: Path) -> None:
    net = build_headed("resnet18", "imagenet", (7,)).eval()
    state = {name.replace("top_layer", "fc"): tensor for name, tensor in published_state_dict(net).items()}
    torch.save({"state_dict": state, "labels": torch.zeros(1, 4, dtype=torch.int64)}, cache / "sela.pth")
    cache_path(SEEDS["sela_resnet18_1k_pp"]).symlink_to(cache / "sela.pth")
    images = torch.randn(2, 3, 64, 64)
    for whole in (load("sela_resnet18_1k_pp", head=True), load("network", weights=str(cache / "sela.pth"))):
        assert torch.equal(whole.eval().predict(images), net.predict(images))
    torch.testing.assert_close(load("sela_resnet18_1k_pp").eval()(images), net.backbone(images))
    with pytest.raises(UserError, match="pretrained=False"):
        load("sela_resnet18_1k_pp", pretrained=False, head=True)


@pytest.mark.parametrize("name", ["resnet50", "deepclusterv2_400ep"])
def test_pretrained_reads_the_published_address(name: str, swav: tuple[MultiCropNet, Path], cache: Path) -> None:
    (cache / VARIANTS[name]).symlink_to(swav[1])
    model = load(name)
    reference = torchvision.models.resnet50(weights=None)
    assert isinstance(model, torchvision.models.ResNet)
    assert list(model.state_dict()) == list(reference.state_dict())
    for key, tensor in swav[0].backbone.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_network_without_a_connection_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot download https://.*/swav_800ep_pretrain\.pth\.tar.*weights=PATH"):
        hub.resnet50()


def test_weights_from_a_file_and_from_an_address(swav: tuple[MultiCropNet, Path], cache: Path) -> None:
    x = torch.randn(2, 3, 64, 64)
    with serve(swav[1].parent) as (url, requested):
        for source in (str(swav[1]), swav[1], f"{url}/swav.pth.tar", f"{url}/swav.pth.tar"):
            model = load("resnet50", weights=source, num_classes=7).eval()
            assert model(x).shape == (2, 7)
            model.fc = torch.nn.Identity()
            torch.testing.assert_close(model(x), swav[0].backbone(x), rtol=1e-4, atol=1e-5)
    assert requested == ["/swav.pth.tar"]


def test_classifier_of_the_file_is_kept_when_it_fits(tmp_path: Path) -> None:
    reference = torchvision.models.resnet50(weights=None, num_classes=5)
    torch.save({"state_dict": reference.state_dict()}, tmp_path / "fc.pth")
    assert torch.equal(hub.resnet50(weights=tmp_path / "fc.pth", num_classes=5).fc.weight, reference.fc.weight)
    other = hub.resnet50(weights=tmp_path / "fc.pth", num_classes=6)
    assert other.fc.weight.shape == (6, 2048) and torch.equal(other.conv1.weight, reference.conv1.weight)


def test_whole_network_with_head(swav: tuple[MultiCropNet, Path]) -> None:
    model = load("resnet50", weights=str(swav[1]), head=True)
    assert all(torch.equal(flat_state_dict(model)[k], t) for k, t in flat_state_dict(swav[0]).items())
    with pytest.raises(UserError, match="pretrained=False"):
        hub.resnet50(pretrained=False, head=True)


def test_wide_backbone_has_no_head() -> None:
    with torch.device("meta"):
        for name, dim in (("resnet50w2", 4096), ("resnet50w4", 8192), ("resnet50w5", 10240)):
            model = load(name, pretrained=False)
            assert model(torch.empty(1, 3, 64, 64)).shape == (1, dim)
            assert not [key for key in model.state_dict() if key.startswith(("projection_head", "prototypes", "fc"))]


def test_weights_of_another_width_are_refused(swav: tuple[MultiCropNet, Path]) -> None:
    with pytest.raises(UserError, match="looks like resnet50 with the imagenet stem"), torch.device("meta"):
        hub.resnet50w2(weights=swav[1])


def test_own_run_of_any_architecture(tmp_path: Path) -> None:
    model = build_model("conv4w8", "small", 12, 6, 5)
    own = {"arch": "conv4w8", "stem": "small", "size_crops": [[32, 32]]}
    torch.save({"epoch": 1, "state_dict": published_state_dict(model), "model": own}, tmp_path / "checkpoint.pth.tar")
    backbone = load("backbone", weights=str(tmp_path / "checkpoint.pth.tar"))
    assert all(torch.equal(backbone.state_dict()[k], t) for k, t in model.backbone.state_dict().items())


HOSTILE = """
import sys
for name in "faiss tyro timm submitit sklearn scipy pandas matplotlib jinja2 tqdm lightly".split():
    sys.modules[name] = None
import src  # the caller's own package of that name
import torch
before = list(sys.path)
model = torch.hub.load(sys.argv[1], "resnet50", source="local", weights=sys.argv[2])
assert sys.path == before, (before, sys.path)
assert src.mine and sys.modules["src"] is src
assert "torchvision" in type(model).__module__
wide = torch.hub.load(sys.argv[1], "resnet50w2", source="local", pretrained=False)
assert wide.feature_dim == 4096
parts = {name.split(".")[1] for name in sys.modules if name.startswith("clusterssl.")}
assert parts == {"errors", "files", "hub", "models"}, parts
print("fine", model.conv1.weight.detach().double().sum().item())
"""


def test_hostile_process(swav: tuple[MultiCropNet, Path], tmp_path: Path) -> None:
    """Other directory, a package called src imported first, every optional package absent, no PYTHONPATH."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "__init__.py").write_text("mine = True\n")
    (tmp_path / "caller.py").write_text(HOSTILE)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "caller.py", str(REPO), str(swav[1])],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "fine"
    assert float(done.stdout.split()[1]) == swav[0].backbone.conv1.weight.detach().double().sum().item()
