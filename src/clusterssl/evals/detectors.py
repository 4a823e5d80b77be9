"""torchvision's detectors on a pretrained ResNet, with random choices that ranks and restarts do not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import detection as zoo
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper

from clusterssl.data import MEAN
from clusterssl.errors import UserError
from clusterssl.rng import Stream, uniform

Detector = Literal["faster_rcnn", "mask_rcnn", "retinanet"]

_CHANNELS = 256
_DRAWS = 5  # kinds of draws of one step: two of either sampler, and the size


def build_detector(
    kind: Detector, backbone: nn.Module, num_classes: int, *, std: Sequence[float], test_size: int, max_size: int,
    new_bn: bool, proposals: int = 512,
) -> nn.Module:  # fmt: skip
    """A detector of torchvision with a feature pyramid on our backbone.

    Args:
        kind: which.
        backbone: a ResNet, ours or torchvision's.
        num_classes: without the background.
        std: of the pixels, as the backbone was trained.
        test_size: shorter side of the images in pixels; in training `set_size` varies it.
        max_size: longest side.
        new_bn: BatchNorm in the new layers: pyramid, box and mask head (RetinaNet: pyramid).
        proposals: that are trained on per image (not RetinaNet).

    Raises:
        UserError: no ResNet.
    """
    if not all(hasattr(backbone, f"layer{i}") for i in range(1, 5)):
        raise UserError(f"--arch {backbone.arch_name}: detectors need the four stages of a ResNet; take one")
    norm = nn.BatchNorm2d if new_bn else None
    wide = int(backbone.feature_dim)  # type: ignore[arg-type]
    stages = (2, 3, 4) if kind == "retinanet" else (1, 2, 3, 4)
    more = LastLevelP6P7(_CHANNELS, _CHANNELS) if kind == "retinanet" else LastLevelMaxPool()
    pyramid = BackboneWithFPN(
        backbone, {f"layer{i}": str(n) for n, i in enumerate(stages)}, [wide // 2 ** (4 - i) for i in stages],
        _CHANNELS, extra_blocks=more, norm_layer=norm,
    )  # fmt: skip
    pixels = {"image_mean": list(MEAN), "image_std": list(std), "min_size": test_size, "max_size": max_size}
    if kind == "retinanet":
        return zoo.RetinaNet(pyramid, num_classes + 1, **pixels)
    heads: dict[str, Any] = {"box_batch_size_per_image": proposals}
    if new_bn:
        heads["box_head"] = FastRCNNConvFCHead((_CHANNELS, 7, 7), [_CHANNELS] * 4, [1024], norm_layer=norm)
    if kind == "faster_rcnn":
        return _scaled(zoo.FasterRCNN(pyramid, num_classes + 1, **heads, **pixels), backbone)
    if new_bn:
        heads["mask_head"] = MaskRCNNHeads(_CHANNELS, [_CHANNELS] * 4, 1, norm_layer=norm)
    return _scaled(zoo.MaskRCNN(pyramid, num_classes + 1, **heads, **pixels), backbone)


def _scaled(model: nn.Module, backbone: nn.Module) -> nn.Module:
    """Tell the pooling its scales, which it would else guess from the first image it meets, never to ask again."""
    first = 0 if backbone.stem_name == "small" else 2
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):  # type: ignore[union-attr]
        if isinstance(pool, MultiScaleRoIAlign):
            pool.scales = [0.5 ** (first + i) for i in range(4)]
            pool.map_levels = initLevelMapper(first, first + 3)
    return model


class CountedSampler:
    """torchvision's choice of anchors and proposals to train on, with draws by (seed, step, image) instead of a state.

    Args:
        like: torchvision's sampler, whose numbers are taken over.
        seed: of the draws.
        kind: keeps samplers of one detector apart.
    """

    def __init__(self, like: Any, seed: int, kind: int) -> None:
        self.size, self.share = like.batch_size_per_image, like.positive_fraction
        self.seed, self.kind = seed, kind
        self.step, self.index = 0, [0]

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks uint8 of the chosen for each image, from 1 and above for positives, 0 for negatives, -1 for neither."""
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for matched_A, i in zip(matched, self.index, strict=True):
            positive, negative = torch.where(matched_A >= 1)[0], torch.where(matched_A == 0)[0]
            wanted = min(len(positive), int(self.size * self.share))
            picks = self._pick(positive, wanted, i, 0), self._pick(negative, self.size - wanted, i, 1)
            for masks, picked in zip(chosen, picks, strict=True):
                masks.append(torch.zeros_like(matched_A, dtype=torch.uint8).index_fill_(0, picked, 1))
        return chosen

    def _pick(self, candidates: Tensor, wanted: int, i: int, sign: int) -> Tensor:
        if len(candidates) <= wanted:
            return candidates
        epoch = self.step * _DRAWS + 2 * self.kind + sign
        keys = uniform(self.seed, Stream.DETECTION, epoch, [i], len(candidates))[0]
        return candidates[torch.from_numpy(np.argpartition(keys, wanted)[:wanted]).to(candidates.device)]


def count_samples(model: nn.Module, seed: int) -> list[CountedSampler]:
    """Put `CountedSampler`s in the places of torchvision's samplers; RetinaNet has none."""
    samplers = []
    for kind, part in enumerate(("rpn", "roi_heads")):
        if hasattr(model, part):
            owner = getattr(model, part)
            samplers.append(CountedSampler(owner.fg_bg_sampler, seed, kind))
            owner.fg_bg_sampler = samplers[-1]
    return samplers


def set_mode(model: nn.Module, training: bool, *, frozen: bool) -> None:
    """Training or evaluation mode; a frozen backbone's BatchNorm always keeps its statistics."""
    model.train(training)
    if frozen:
        model.backbone.body.eval()  # type: ignore[union-attr]


def set_size(model: nn.Module, shorter: int) -> None:
    """Length in pixels that the shorter side of the images gets."""
    model.transform.min_size = (shorter,)  # type: ignore[union-attr]


def scale_of(step: int, seed: int, sizes: Sequence[int]) -> int:
    """Shorter side of the images of a training step, the same on all ranks."""
    return sizes[int(uniform(seed, Stream.DETECTION, step * _DRAWS + 4, [0], 1)[0, 0] * len(sizes))]
