"""Networks for torch.hub: SwAV's entry names and every published variant by name. Needs torch and torchvision only."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torchvision
from torch import nn

from clusterssl.errors import UserError
from clusterssl.models.build import build_backbone
from clusterssl.models.download import PUBLISHED
from clusterssl.models.weights import (
    backbone_from_weights,
    load_backbone,
    load_backbone_state,
    model_from_weights,
    read_weights,
)

__all__ = [
    "backbone",
    "deepcluster_alexnet",
    "deepcluster_vgg16",
    "deepclusterv2_400ep",
    "deepclusterv2_400ep_2x224",
    "deepclusterv2_800ep",
    "network",
    "resnet50",
    "resnet50w2",
    "resnet50w4",
    "resnet50w5",
    "sela_alexnet_10x3k",
    "sela_resnet18_1k_pp",
    "sela_resnet50_1k_pp",
    "sela_resnet50_10x3k_pp",
    "sela_resnetv2_10x3k",
    "selav2_400ep",
    "selav2_400ep_2x224",
    "selfclassifier_resnet50",
    "swav_100ep",
    "swav_200ep",
    "swav_200ep_bs256",
    "swav_400ep",
    "swav_400ep_2x224",
    "swav_400ep_bs256",
    "swav_800ep",
    "swav_RN50w2_400ep",
    "swav_RN50w4_400ep",
    "swav_RN50w5_400ep",
]

logger = logging.getLogger(__name__)

_DOC = """{title} pretrained without labels.

Args:
    pretrained: load the published weights, {url}
    weights: a local file or an address to load instead.
    head: return the whole network of the file, with projection head and prototypes: a list of crops B x 3 x H x W
        to embeddings and scores.
    kwargs: {kwargs}

Returns:
    {returns}

Raises:
    UserError: the weights cannot be downloaded, read, or do not fit (missing and unexpected names are listed).
"""


def _entry(name: str, arch: str = "resnet50", published: str = "") -> Callable[..., nn.Module]:
    """Entry point called `name` that builds `arch`; `published` names its weights where that is not `name` itself."""
    url = f"{PUBLISHED}/{published or name}_pretrain.pth.tar"
    plain = arch == "resnet50"

    def build(
        pretrained: bool = True, *, weights: str | Path | None = None, head: bool = False, **kwargs: Any
    ) -> nn.Module:
        source = str(weights) if weights is not None else url if pretrained else ""
        if head:
            return _with_head(name, source, kwargs)
        model = torchvision.models.resnet50(weights=None, **kwargs) if plain else build_backbone(arch, **kwargs)
        if source:
            _load(model, source)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = _DOC.format(
        title="ResNet-50" if plain else f"Wide ResNet-50 ({arch})",
        url=url,
        kwargs="for torchvision.models.resnet50, as num_classes." if plain else 'stem, "imagenet" or "small".',
        returns="torchvision's ResNet-50; its last layer fc keeps random values unless the file has it."
        if plain
        else "Backbone without head: images B x 3 x H x W to features B x feature_dim.",
    )
    return build


def _with_head(name: str, source: str, kwargs: dict[str, Any]) -> nn.Module:
    if not source or kwargs:
        raise UserError(f"{name}(head=True) builds what the file holds; it takes neither pretrained=False nor {kwargs}")
    return model_from_weights(source)


def _load(model: nn.Module, source: str) -> None:
    """Load strictly, except that a classifier fc that the file lacks or has in another size keeps its values."""
    state, _ = read_weights(source)
    own_fc = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("fc.")}
    if any(name not in state or state[name].shape != tensor.shape for name, tensor in own_fc.items()):
        logger.info("%s: no fc of this size in it, fc keeps its random values", source)
        state = state | own_fc
    load_backbone_state(model, state, source)


def _seed_entry(name: str, arch: str, url: str = "", found: str = "") -> Callable[..., nn.Module]:
    """Entry point called `name` for a network of DeepCluster, SeLa or Self-Classifier.

    Args:
        name: of the entry point.
        arch: see `build_backbone`.
        url: of the published weights.
        found: where a person finds them, when no address holds the file itself.
    """

    def build(pretrained: bool = True, *, weights: str | Path | None = None, head: bool = False) -> nn.Module:
        if pretrained and weights is None and not url:
            raise UserError(
                f"{name}: its weights are not an address of their own; take them from {found}, weights=PATH"
            )
        source = str(weights) if weights is not None else url if pretrained else ""
        if head:
            return _with_head(name, source, {})
        model = build_backbone(arch)
        if source:
            load_backbone(model, source)
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = _DOC.format(
        title=f"{arch}, as published,",
        url=url or f"which must be taken from {found} and given as weights=PATH",
        kwargs="none.",
        returns="Backbone without head: images B x 3 x H x W to features B x feature_dim.",
    )
    return build


def network(weights: str | Path) -> nn.Module:
    """Whole network of any checkpoint of this suite or of the published systems, with heads, prototypes or classifiers.

    Call `eval()` on it and then `predict(images, head=0)` for the cluster ids B of images B x 3 x H x W.

    Args:
        weights: a local file or an address.

    Returns:
        Network from a list of crops B x 3 x H x W to embeddings or features and the scores of every head.

    Raises:
        UserError: the weights cannot be downloaded or read, or their architecture is not known.
    """
    return model_from_weights(str(weights))


def backbone(weights: str | Path) -> nn.Module:
    """Backbone of any checkpoint of this suite or of the SwAV family; the architecture is read from the file.

    Args:
        weights: a local file or an address.

    Returns:
        Images B x 3 x H x W to features B x feature_dim.

    Raises:
        UserError: the weights cannot be downloaded or read, or their architecture is not known.
    """
    return backbone_from_weights(str(weights))


resnet50 = _entry("resnet50", published="swav_800ep")
resnet50w2 = _entry("resnet50w2", "resnet50w2", "swav_RN50w2_400ep")
resnet50w4 = _entry("resnet50w4", "resnet50w4", "swav_RN50w4_400ep")
resnet50w5 = _entry("resnet50w5", "resnet50w5", "swav_RN50w5_400ep")

swav_800ep = _entry("swav_800ep")
swav_400ep = _entry("swav_400ep")
swav_200ep = _entry("swav_200ep")
swav_100ep = _entry("swav_100ep")
swav_200ep_bs256 = _entry("swav_200ep_bs256")
swav_400ep_bs256 = _entry("swav_400ep_bs256")
swav_400ep_2x224 = _entry("swav_400ep_2x224")
swav_RN50w2_400ep = _entry("swav_RN50w2_400ep", "resnet50w2")
swav_RN50w4_400ep = _entry("swav_RN50w4_400ep", "resnet50w4")
swav_RN50w5_400ep = _entry("swav_RN50w5_400ep", "resnet50w5")
deepclusterv2_800ep = _entry("deepclusterv2_800ep")
deepclusterv2_400ep = _entry("deepclusterv2_400ep")
deepclusterv2_400ep_2x224 = _entry("deepclusterv2_400ep_2x224")
selav2_400ep = _entry("selav2_400ep")
selav2_400ep_2x224 = _entry("selav2_400ep_2x224")

deepcluster_alexnet = _seed_entry(
    "deepcluster_alexnet", "sobel:deepcluster_alexnet", f"{PUBLISHED}/alexnet/checkpoint.pth.tar"
)
deepcluster_vgg16 = _seed_entry("deepcluster_vgg16", "sobel:deepcluster_vgg16", f"{PUBLISHED}/vgg16/checkpoint.pth.tar")
_SELA = "http://www.robots.ox.ac.uk/~vgg/research/self-label/asset"
sela_resnet18_1k_pp = _seed_entry("sela_resnet18_1k_pp", "resnet18", f"{_SELA}/new_models/resnet18-1k_pp.pth")
sela_resnet50_1k_pp = _seed_entry("sela_resnet50_1k_pp", "resnet50", f"{_SELA}/new_models/resnet50-1k_pp.pth")
sela_resnet50_10x3k_pp = _seed_entry("sela_resnet50_10x3k_pp", "resnet50", f"{_SELA}/new_models/resnet50-10x3k_pp.pth")
sela_resnetv2_10x3k = _seed_entry(
    "sela_resnetv2_10x3k", "sela_resnetv2", found=f"{_SELA}/pretrained.zip, resnet-10x3k.pth in it"
)
sela_alexnet_10x3k = _seed_entry(
    "sela_alexnet_10x3k", "sela_alexnet", found=f"{_SELA}/pretrained.zip, alexnet-10x3k-wRot.pth in it"
)
selfclassifier_resnet50 = _seed_entry(
    "selfclassifier_resnet50", "resnet50",
    found="https://drive.google.com/drive/folders/1o8M1cSVnhsMsdiRejj0DweWs2mhtP57F",
)  # fmt: skip
