"""What network a state dict belongs to, read from its names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clusterssl.models.convnet import is_convnet
from clusterssl.models.resnet import RESNETS, shape_of

HEAD_PARTS = ("projection_head", "prototypes")


@dataclass(frozen=True)
class Look:
    """Arguments of `build_model` that make the network of a file."""

    arch: str
    stem: str
    hidden_mlp: int
    feat_dim: int
    nmb_prototypes: int | tuple[int, ...]
    head_bn: bool


def describe(state: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> Look | None:
    """The network of a flat state dict (names without "module."); None when its backbone is not one of ours.

    Args:
        state: names and tensors.
        meta: the "model" entry of an own checkpoint, which is believed where it names arch and stem.
    """
    arch, stem = _backbone(state)
    meta = meta or {}
    arch, stem = str(meta.get("arch", arch or "")), str(meta.get("stem", stem))
    if not arch:
        return None
    head = {name: tensor for name, tensor in state.items() if name.startswith("projection_head.")}
    linears = [head[name] for name in sorted(head) if name.endswith("weight") and head[name].ndim == 2]
    return Look(
        arch=arch,
        stem=stem,
        hidden_mlp=len(linears[0]) if len(linears) > 1 else 0,
        feat_dim=len(linears[-1]) if linears else 0,
        nmb_prototypes=_prototypes(state),
        head_bn=len(linears) < 2 or any(name.endswith("running_mean") for name in head),
    )


def look_of(state: Mapping[str, Tensor]) -> str:
    """Half a sentence that names the architecture of a file, or nothing."""
    arch, stem = _backbone(state)
    return f"; the file looks like {arch} with the {stem} stem" if arch else ""


def _backbone(state: Mapping[str, Tensor]) -> tuple[str | None, str]:
    first = state.get("conv1.weight")
    if first is None or first.ndim != 4:
        return None, "imagenet"
    stem = "small" if first.shape[-1] == 3 else "imagenet"
    if "conv4.weight" in state and is_convnet(f"conv4w{len(first)}"):
        return ("conv4" if len(first) == 16 else f"conv4w{len(first)}"), "small"
    blocks = {m[1] for name in state if (m := re.match(r"(layer\d\.\d+)\.conv1\.weight$", name))}
    layers = tuple(sum(block.startswith(f"layer{i}.") for block in blocks) for i in range(1, 5))
    seen = ("layer1.0.conv3.weight" in state, layers, len(first))
    return next((arch for arch in RESNETS if shape_of(arch) == seen), None), stem


def _prototypes(state: Mapping[str, Tensor]) -> int | tuple[int, ...]:
    if "prototypes.weight" in state:
        return len(state["prototypes.weight"])
    layers = [name for name in state if re.fullmatch(r"prototypes\.prototypes\d+\.weight", name)]
    return tuple(len(state[f"prototypes.prototypes{i}.weight"]) for i in range(len(layers))) or 0
