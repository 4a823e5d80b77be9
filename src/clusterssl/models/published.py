"""The networks that only the published systems have, by name; and what those systems' --arch flags mean."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from clusterssl.models.sela_resnet import resnetv1, resnetv2
from clusterssl.models.sobel import see_edges
from clusterssl.models.trunks import alexnet, vgg16
from clusterssl.models.vit import ViT

_WITH_FILTERS: dict[str, Callable[[bool], nn.Module]] = {
    "deepcluster_alexnet": lambda sobel: alexnet(sobel=sobel),
    "deepcluster_vgg16": lambda sobel: vgg16(sobel=sobel),
    "sela_alexnet": lambda sobel: alexnet(sobel=sobel),
    "sela_alexnet_small": lambda sobel: alexnet((64, 192, 384, 256, 256), sobel),
}
"""networks whose files hold the edge filters"""

_PLAIN: dict[str, Callable[[], nn.Module]] = {
    "sela_resnetv1": resnetv1,
    "sela_resnetv2": resnetv2,
    "vit_tiny": partial(ViT, 192, 3),
    "vit_small": partial(ViT, 384, 6),
    "vit_base": partial(ViT, 768, 12),
}
TRUNKS = (*_WITH_FILTERS, *_PLAIN)

_FLAGS = {
    "deepcluster": {"alexnet": "deepcluster_alexnet", "vgg16": "deepcluster_vgg16"},
    "sela": {
        "alexnet": "sela_alexnet", "alexnet_big": "sela_alexnet", "alexnet_small": "sela_alexnet_small",
        "resnetv1": "sela_resnetv1", "resnetv2": "sela_resnetv2",
    },
}  # fmt: skip


def published_arch(system: str, arch: str, sobel: bool = False) -> str:
    """The name for `build_backbone` of what a published system's script calls `arch`.

    Args:
        system: "deepcluster" or "sela", whose alexnet and vgg16 are not torchvision's; others' names stay.
        arch: the flag's value; SeLa's --archspec may follow it, "alexnet_small".
        sobel: edge filters before the network: "sobel:NAME".
    """
    name = _FLAGS.get(system, {}).get(arch, arch)
    return f"sobel:{name}" if sobel and not name.startswith("sobel:") else name


def trunk(name: str, sobel: bool) -> nn.Module:
    """Network by its name, one of `TRUNKS`."""
    if name in _WITH_FILTERS:
        return _WITH_FILTERS[name](sobel)
    network = _PLAIN[name]()
    if sobel:
        see_edges(network, name)
    return network
