"""Backbones of other libraries: any classification model of torchvision, any model of timm (optional)."""

from __future__ import annotations

import difflib
import logging
from typing import Any

import torchvision
from torch import nn

from clusterssl.errors import UserError

logger = logging.getLogger(__name__)


def torchvision_backbone(arch: str, stem: str) -> tuple[nn.Module, str]:
    """Classification model of torchvision without its last layer, and the stem it really has.

    The names of all other parameters stay torchvision's; attribute `classifier_name` names the removed layer.
    """
    # GoogLeNet and Inception are the two with auxiliary outputs, and warn unless told how to initialise.
    options: dict[str, Any] = (
        {"aux_logits": False, "init_weights": True} if arch in ("googlenet", "inception_v3") else {}
    )
    model = torchvision.models.get_model(arch, weights=None, **options)
    name, layer = _last_layer(model)
    model.set_submodule(name, nn.Identity())
    model.feature_dim = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    model.classifier_name = name
    if stem == "small" and not isinstance(model, torchvision.models.ResNet):
        logger.warning("%s has no small-image stem; its own stem is kept", arch)
        stem = "imagenet"
    elif stem == "small":
        _shrink_stem(model)
    return model, stem


def _last_layer(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """The layer that gives the class scores: the last Linear, or the last convolution where there is none."""
    linears = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if linears:
        return linears[-1]
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)][-1]


def _shrink_stem(model: nn.Module) -> None:
    """Replace the 7x7 stride-2 convolution and the max-pool of a torchvision ResNet by a 3x3 convolution."""
    old = model.conv1
    assert isinstance(old, nn.Conv2d)
    model.conv1 = nn.Conv2d(3, old.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()


def timm_backbone(name: str, stem: str) -> tuple[nn.Module, str]:
    """Model of timm without its classifier, and the stem it really has; never downloads weights.

    Raises:
        UserError: timm is not installed or knows no model of that name.
    """
    try:
        import timm
    except ImportError:
        raise UserError(f"--arch timm:{name}: timm is not installed; run pip install timm") from None
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UserError(f"--arch timm:{name}: unknown timm model{hint}")
    model: Any
    try:
        model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError:  # only vision transformers know that option
        model = timm.create_model(name, pretrained=False, num_classes=0)
    model.feature_dim = getattr(model, "head_hidden_size", None) or model.num_features
    classifier = model.pretrained_cfg.get("classifier") or ""
    model.classifier_name = classifier if isinstance(classifier, str) else classifier[0]
    if stem == "small":
        logger.warning("timm:%s keeps its own stem; --stem small has no effect", name)
    return model, "imagenet"
