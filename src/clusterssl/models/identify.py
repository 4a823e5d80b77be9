"""What network a state dict belongs to, read from its names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clusterssl.models.convnet import is_convnet
from clusterssl.models.headed import head_sizes
from clusterssl.models.resnet import RESNETS, shape_of

_HEAD = re.compile(r"(projection_head|prototypes|top_layer\d*|mlp_head|cls_\d+)\.")


def head_part(name: str) -> str:
    """The part of a network above its backbone that a flat name belongs to; "" for the backbone's own names."""
    match = _HEAD.match(name)
    return match[1] if match else ""


@dataclass(frozen=True)
class Look:
    """The network of a file: its class (`Network.net`), its backbone and the other arguments of its maker."""

    arch: str
    stem: str
    net: str = "multicrop"
    options: dict[str, Any] = field(default_factory=dict)


def describe(state: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> Look | None:
    """The network of a flat state dict (see `weights`); None when its backbone is not one of ours.

    Args:
        state: names and tensors; sizes are always theirs.
        meta: the "model" entry of an own checkpoint, which is believed in what shapes do not tell: arch, stem, net, ...
    """
    arch, stem = _backbone(state)
    meta = meta or {}
    arch, stem = str(meta.get("arch", arch or "")), str(meta.get("stem", stem))
    if not arch:
        return None
    parts = {head_part(name) for name in state}
    net = "selfclassifier" if "mlp_head" in parts or "cls_0" in parts else "multicrop"
    net = "headed" if any(part.startswith("top_layer") for part in parts) else net
    net = str(meta.get("net", net))
    options = _OPTIONS[net](state, arch)
    told = {key: value for key, value in meta.items() if key in options and key in _NOT_IN_SHAPES}
    return Look(arch, stem, net, {**options, **told})


def classifier_as_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the classifier `fc` of a residual network as its head, where it has no other.

    SeLa's files in torchvision's names keep their first head there.
    """
    if "fc.weight" not in state or "layer4.0.conv1.weight" not in state or any(map(head_part, state)):
        return dict(state)
    return {re.sub(r"^fc\.", "top_layer.", name): tensor for name, tensor in state.items()}


_NOT_IN_SHAPES = ("normalize", "relu_before_heads", "head_std", "no_leaky", "fixed_cls")


def _multicrop(state: Mapping[str, Tensor], arch: str) -> dict[str, Any]:
    head = {name: tensor for name, tensor in state.items() if name.startswith("projection_head.")}
    linears = [head[name] for name in sorted(head) if name.endswith("weight") and head[name].ndim == 2]
    return {
        "hidden_mlp": len(linears[0]) if len(linears) > 1 else 0,
        "feat_dim": len(linears[-1]) if linears else 0,
        "nmb_prototypes": _prototypes(state),
        "head_bn": len(linears) < 2 or any(name.endswith("running_mean") for name in head),
        "normalize": True,
    }


def _headed(state: Mapping[str, Tensor], arch: str) -> dict[str, Any]:
    cut = arch.removeprefix("sobel:").startswith(("deepcluster_", "sela_alexnet"))
    return {"nmb_clusters": head_sizes(state), "relu_before_heads": cut, "head_std": 0.01 if cut else 0.0}


def _selfclassifier(state: Mapping[str, Tensor], arch: str) -> dict[str, Any]:
    mlp = {name: tensor for name, tensor in state.items() if name.startswith("mlp_head.")}
    linears = [mlp[name] for name in sorted(mlp, key=_position) if name.endswith("weight") and mlp[name].ndim == 2]
    classifiers = sum(re.fullmatch(r"cls_\d+\.weight_v", name) is not None for name in state)
    sizes = {"hidden_dim": len(linears[0]), "dim": len(linears[-1])} if linears else {}
    return {
        "cls_size": tuple(len(state[f"cls_{i}.weight_v"]) for i in range(classifiers)),
        "num_hidden": len(linears),
        **sizes,
        "use_bn": len(linears) < 2 or any(name.endswith("running_mean") for name in mlp),
        "no_leaky": False,
        "fixed_cls": False,
    }


def _position(name: str) -> int:
    """Number of the layer that a name ends with."""
    return int((re.findall(r"\.(\d+)\.", name) or ["0"])[-1])


_OPTIONS = {"multicrop": _multicrop, "headed": _headed, "selfclassifier": _selfclassifier}


def look_of(state: Mapping[str, Tensor]) -> str:
    """Half a sentence that names the architecture of a file, or nothing."""
    arch, stem = _backbone(state)
    return f"; the file looks like {arch} with the {stem} stem" if arch else ""


def _backbone(state: Mapping[str, Tensor]) -> tuple[str | None, str]:
    """Architecture and stem; the number of input channels tells edges from colours."""
    first = next((state[name] for name in _FIRST if name in state), None)
    if first is None or first.ndim != 4:
        return None, "imagenet"
    arch, stem = _of_layers(state, first)
    return (f"sobel:{arch}" if arch and first.shape[1] == 2 else arch), stem


_FIRST = ("conv1.weight", "features.0.weight", "patch_embed.proj.weight")


def _of_layers(state: Mapping[str, Tensor], first: Tensor) -> tuple[str | None, str]:
    if "conv1.weight" not in state:
        return _published(state, first), "imagenet"
    stem = "small" if first.shape[-1] == 3 else "imagenet"
    if "conv4.weight" in state and is_convnet(f"conv4w{len(first)}"):
        return ("conv4" if len(first) == 16 else f"conv4w{len(first)}"), "small"
    blocks = {m[1] for name in state if (m := re.match(r"(layer\d\.\d+)\.conv1\.weight$", name))}
    layers = tuple(sum(block.startswith(f"layer{i}.") for block in blocks) for i in range(1, 5))
    seen = ("layer1.0.conv3.weight" in state, layers, len(first))
    return next((arch for arch in RESNETS if shape_of(arch) == seen), None), stem


def _published(state: Mapping[str, Tensor], first: Tensor) -> str | None:
    """One of `published.TRUNKS`; torchvision's AlexNet and VGG have a third linear layer or no BatchNorm."""
    edges = first.shape[1] == 2
    signs = {
        "sela_resnetv2": "features.2.0.bn1.weight" in state,
        "sela_resnetv1": "features.4.0.conv1.weight" in state,
        "deepcluster_alexnet" if edges else "sela_alexnet": "features.15.running_mean" in state and len(first) == 96,
        "sela_alexnet_small": "features.15.running_mean" in state and first.shape[-1] == 11 and len(first) == 64,
        "deepcluster_vgg16": "features.41.running_mean" in state and "classifier.6.weight" not in state,
    }
    if "cls_token" in state and first.shape[-1] == 16 and "blocks.11.mlp.fc2.weight" in state:
        return {192: "vit_tiny", 384: "vit_small", 768: "vit_base"}.get(len(first))
    return next((arch for arch, found in signs.items() if found), None)


def _prototypes(state: Mapping[str, Tensor]) -> int | tuple[int, ...]:
    if "prototypes.weight" in state:
        return len(state["prototypes.weight"])
    layers = [name for name in state if re.fullmatch(r"prototypes\.prototypes\d+\.weight", name)]
    return tuple(len(state[f"prototypes.prototypes{i}.weight"]) for i in range(len(layers))) or 0
