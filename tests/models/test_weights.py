"""Reading and strict loading of published, own, damaged and hostile checkpoints."""

from __future__ import annotations

import logging
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from clusterssl.errors import UserError
from clusterssl.models.build import MultiCropNet, build_backbone, build_model
from clusterssl.models.weights import (
    backbone_from_weights,
    flat_state_dict,
    init_model,
    load_backbone,
    load_published,
    model_from_weights,
    published_state_dict,
    read_weights,
)


def tiny(
    number: int | tuple[int, ...] = 5,
    *,
    arch: str = "conv4w8",
    stem: str = "imagenet",
    hidden: int = 12,
    dim: int = 6,
    bn: bool = True,
) -> MultiCropNet:
    return build_model(arch, stem, hidden, dim, number, bn)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


LAYOUTS: dict[str, Any] = {
    "flat with module.": lambda flat: {"module." + name: t for name, t in flat.items()},
    "flat": dict,
    "ordered": lambda flat: OrderedDict(("module." + name, t) for name, t in flat.items()),
    "wrapped": lambda flat: {
        "epoch": 7,
        "state_dict": {"module." + name: t for name, t in flat.items()},
        "best_acc": 0.5,
    },
    "wrapped without module.": lambda flat: {
        "state_dict": flat,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    },
    "under model": lambda flat: {"model": flat},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_every_layout_reads_the_same(layout: str, zipped: bool, tmp_path: Path) -> None:
    model = tiny()
    path = tmp_path / "weights.pth.tar"
    torch.save(LAYOUTS[layout](flat_state_dict(model)), path, _use_new_zipfile_serialization=zipped)
    state, meta = read_weights(str(path))
    assert same(state, flat_state_dict(model)) and meta == {}
    other = tiny()
    assert not same(flat_state_dict(other), state)
    load_published(other, state)
    assert same(flat_state_dict(other), flat_state_dict(model))


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"number": (5, 4)},
        {"bn": False},
        {"hidden": 0},
        {"number": 0, "hidden": 0},
        {"dim": 0},
        {"arch": "conv4"},
        {"arch": "resnet18"},
        {"arch": "resnet18", "stem": "small"},
        {"arch": "resnet34", "bn": False},
    ],
    ids=str,
)
def test_the_file_decides_the_network(shape: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(**shape)
    torch.save(published_state_dict(model), tmp_path / "weights.pth")
    again = model_from_weights(str(tmp_path / "weights.pth"))
    assert same(published_state_dict(again), published_state_dict(model))
    assert again.backbone.arch_name == model.backbone.arch_name
    assert again.backbone.stem_name == model.backbone.stem_name
    alone = backbone_from_weights(str(tmp_path / "weights.pth"))
    assert same(alone.state_dict(), model.backbone.state_dict())


def test_head_without_batch_norm_as_the_w5_file(tmp_path: Path) -> None:
    without = tiny(bn=False)
    assert {n for n in flat_state_dict(without) if n.startswith("projection_head.2")}
    with pytest.raises(UserError, match=r"missing: projection_head\.1\.weight"):
        load_published(tiny(), flat_state_dict(without))
    other = tiny(bn=False)
    load_published(other, flat_state_dict(without))
    assert same(flat_state_dict(other), flat_state_dict(without))


def test_own_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    model = tiny(arch="timm:mobilenetv3_small_050")
    own = {"arch": "timm:mobilenetv3_small_050", "stem": "imagenet", "size_crops": [[32, 32], [16, 16]]}
    torch.save({"state_dict": published_state_dict(model), "model": own}, tmp_path / "checkpoint.pth.tar")
    state, meta = read_weights(str(tmp_path / "checkpoint.pth.tar"))
    assert meta == own and same(state, flat_state_dict(model))
    assert same(flat_state_dict(model_from_weights(str(tmp_path / "checkpoint.pth.tar"))), state)


def test_names_survive_compiling_and_wrapping() -> None:
    model = tiny()
    expected = published_state_dict(model)
    assert same(published_state_dict(torch.compile(model)), expected)
    assert same(published_state_dict(torch.nn.DataParallel(model)), expected)
    compiled = torch.compile(tiny())
    load_published(compiled, expected)
    assert same(published_state_dict(compiled), expected)


def test_differences_are_listed_and_nothing_is_loaded() -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in flat_state_dict(model).items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    del state["bn2.weight"]
    state["surplus"] = torch.zeros(1)
    state["prototypes.weight"] = torch.zeros(9, 6)
    with pytest.raises(UserError) as error:
        load_published(model, state, "some/file.pth")
    text = str(error.value)
    assert text.startswith("some/file.pth: ") and "\n" not in text
    assert "1 missing: bn2.weight" in text and "1 unexpected: surplus" in text
    assert "1 of another shape: prototypes.weight 9x6 instead of 5x6" in text
    assert same(flat_state_dict(model), before)


def test_error_names_the_architecture_of_the_file(tmp_path: Path) -> None:
    torch.save(published_state_dict(tiny(arch="resnet18")), tmp_path / "r18.pth")
    with pytest.raises(UserError, match=r"looks like resnet18 with the imagenet stem$"):
        load_backbone(build_backbone("resnet34"), str(tmp_path / "r18.pth"))
    with pytest.raises(UserError, match="looks like resnet18 with the imagenet stem"):
        init_model(build_model("resnet18", "small", 0, 6, 5), str(tmp_path / "r18.pth"))


def test_absent_batch_counters_of_old_files_are_accepted() -> None:
    state = {n: t for n, t in flat_state_dict(tiny()).items() if not n.endswith("num_batches_tracked")}
    model = tiny()
    load_published(model, state)
    assert all(torch.equal(flat_state_dict(model)[name], tensor) for name, tensor in state.items())


def test_backbone_alone_leaves_heads_aside_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny((5, 4))
    torch.save(published_state_dict(model), tmp_path / "w.pth")
    backbone = build_backbone("conv4w8")
    with caplog.at_level(logging.INFO):
        extra = load_backbone(backbone, str(tmp_path / "w.pth"))
    assert same(backbone.state_dict(), model.backbone.state_dict())
    assert "prototypes.prototypes1.weight" in extra and "projection_head.0.weight" in extra
    assert "not part of the backbone: projection_head, prototypes (11 tensors)" in caplog.text and len(extra) == 11


@pytest.mark.parametrize("spoil", ["missing", "unexpected", "shape"])
def test_backbone_is_strict(spoil: str, tmp_path: Path) -> None:
    state = dict(published_state_dict(tiny()))
    if spoil == "missing":
        del state["module.conv3.weight"]
    else:
        state["module.conv9.weight" if spoil == "unexpected" else "module.conv3.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="conv9.weight" if spoil == "unexpected" else "conv3.weight"):
        load_backbone(build_backbone("conv4w8"), str(tmp_path / "w.pth"))


def test_torchvision_file_fits_the_backbone_of_that_name(tmp_path: Path) -> None:
    for arch in ("resnet18", "mobilenet_v3_small"):
        reference = torchvision.models.get_model(arch, weights=None)
        torch.save(reference.state_dict(), tmp_path / "tv.pth")
        backbone = build_backbone(arch)
        extra = load_backbone(backbone, str(tmp_path / "tv.pth"))
        assert len(extra) == 2 and same(
            backbone.state_dict(), {n: t for n, t in reference.state_dict().items() if n not in extra}
        )


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ({}, []),
        ({"number": 9}, ["prototypes"]),
        ({"number": (5, 5)}, ["prototypes"]),
        ({"hidden": 24}, ["projection_head"]),
        ({"dim": 8}, ["projection_head", "prototypes"]),
        ({"bn": False}, ["projection_head"]),
        ({"number": 0}, []),
    ],
    ids=str,
)
def test_init_takes_what_fits(
    shape: dict[str, Any], left: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(**shape)
    source = tiny()
    torch.save({"epoch": 3, "state_dict": published_state_dict(source)}, tmp_path / "w.pth")
    before = {name: tensor.clone() for name, tensor in flat_state_dict(model).items()}
    with caplog.at_level(logging.INFO):
        assert init_model(model, str(tmp_path / "w.pth")) == left
    for name, tensor in flat_state_dict(model).items():
        part = name.split(".")[0]
        expected = before if part in left else flat_state_dict(source)
        assert torch.equal(tensor, expected[name]), name
    assert all(part in caplog.text for part in left) and ("left at random" in caplog.text) == bool(left)


class Payload:
    """Runs a command when unpickled without protection."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["pickle", "torch", "inside", "legacy"])
def test_hostile_file_is_never_run(kind: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    payload = Payload(marker)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(payload, protocol=2))
    elif kind == "inside":
        torch.save({"state_dict": published_state_dict(tiny()), "args": payload}, path)
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(UserError) as error:
        read_weights(str(path))
    assert not marker.exists()
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
def test_truncated_file_is_one_line(keep: float, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "short.pth"
    torch.save(published_state_dict(tiny()), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(UserError, match=r"short\.pth") as error:
        read_weights(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"epoch": 3},
        {"state_dict": {}},
        {"state_dict": {"epoch": 3}},
        {"a": torch.zeros(1), "b": "text"},
        {1: torch.zeros(1)},
        {"module.a": torch.zeros(1), "a": torch.zeros(1)},
        [torch.zeros(1)],
        torch.zeros(1),
    ],
)
def test_foreign_content_is_one_line(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "foreign.pth")
    with pytest.raises(UserError, match=r"foreign\.pth") as error:
        read_weights(str(tmp_path / "foreign.pth"))
    assert "\n" not in str(error.value)


def test_missing_file_and_text_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.pth"):
        read_weights(str(tmp_path / "nothing.pth"))
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"text\.pth"):
        read_weights(str(tmp_path / "text.pth"))


def test_unknown_network_must_be_named(tmp_path: Path) -> None:
    torch.save({"body.weight": torch.zeros(3, 4), "body.bias": torch.zeros(3)}, tmp_path / "body.pth")
    with pytest.raises(UserError, match=r"body\.weight, body\.bias"):
        model_from_weights(str(tmp_path / "body.pth"))
