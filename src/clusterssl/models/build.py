"""Networks by name, and the multi-crop network that the methods train.

Legend of suffixes: V crops, B images, N = V * B rows, D embedding size, K prototypes.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clusterssl.errors import UserError
from clusterssl.files import first_line
from clusterssl.models.convnet import convnet, is_convnet
from clusterssl.models.external import timm_backbone, torchvision_backbone
from clusterssl.models.heads import MultiPrototypes, normalize_rows_, projection_head, prototypes
from clusterssl.models.network import Network
from clusterssl.models.published import TRUNKS, trunk
from clusterssl.models.resnet import RESNETS, resnet
from clusterssl.models.sobel import see_edges

logger = logging.getLogger(__name__)

STEMS = ("imagenet", "small")
_SMALL_PIXELS = 64
_USUAL_SIDES = [4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 288, 384]
"""of crops, tried when a network cannot take another"""


def resolve_stem(stem: str, largest_crop: int) -> str:
    """Stem for crops of at most `largest_crop` pixels a side: "auto" means "small" up to 64 pixels.

    Raises:
        UserError: `stem` is none of auto, imagenet, small.
    """
    if stem == "auto":
        return "small" if largest_crop <= _SMALL_PIXELS else "imagenet"
    _check_stem(stem)
    return stem


def _check_stem(stem: str) -> None:
    if stem not in STEMS:
        raise UserError(f"--stem {stem}: unknown stem; use auto, imagenet or small")


def build_backbone(arch: str, stem: str = "imagenet") -> nn.Module:
    """Backbone without classifier.

    Args:
        arch: resnet18, 34, 50, 101, 152, 50w2, 50w4, 50w5, conv4, conv4wN, one of `published.TRUNKS`, a classification
            model of torchvision, or "timm:NAME"; "sobel:" before any of them puts fixed edge filters before it.
        stem: "imagenet" or "small" (3x3 stride 1, no max-pool); networks without a stem of that kind ignore it.

    Returns:
        Module from images B x 3 x H x W to features B x feature_dim; attributes feature_dim, arch_name, stem_name.

    Raises:
        UserError: unknown architecture or stem, or timm is asked for and absent.
    """
    _check_stem(stem)
    name = arch.removeprefix("sobel:")
    sobel = name != arch
    if name in TRUNKS:
        backbone, stem = trunk(name, sobel), "imagenet"
    else:
        backbone, stem = _colour_backbone(name, stem)
        if sobel:
            see_edges(backbone, name)
    backbone.arch_name, backbone.stem_name = arch, stem  # type: ignore[assignment]
    return backbone


def _colour_backbone(arch: str, stem: str) -> tuple[nn.Module, str]:
    """A network of this library or of others, and the stem it really has."""
    if arch in RESNETS:
        return resnet(arch, stem), stem
    if is_convnet(arch):
        return convnet(arch), "small"
    if arch.startswith("timm:"):
        return timm_backbone(arch.removeprefix("timm:"), stem)
    if arch in torchvision.models.list_models(module=torchvision.models):
        return torchvision_backbone(arch, stem)
    raise UserError(f"--arch {arch}: unknown architecture{_nearest(arch)}")


@torch.no_grad()
def check_crop_sizes(backbone: nn.Module, sizes: Iterable[tuple[int, int]], flag: str = "--size_crops") -> None:
    """Try one blank image of every size, so that one that is too small or not of a fixed size is refused before a run.

    Args:
        backbone: as `build_backbone` made it; its mode and statistics are left as they are.
        sizes: (height, width) of the crops.
        flag: that says the sizes.

    Raises:
        UserError: the network cannot take a size.
    """
    was_training = backbone.training
    backbone.eval()
    for height, width in dict.fromkeys(sizes):
        problem = _refusal(backbone, height, width)
        if problem:
            taken = [side for side in _USUAL_SIDES if not _refusal(backbone, side, side)]
            more = " and more" if len(taken) > 1 and taken == _USUAL_SIDES[-len(taken) :] else ""
            takes = f"it takes {taken[0] if more else ' or '.join(map(str, taken))}{more}" if taken else problem
            raise UserError(
                f"{flag}: --arch {backbone.arch_name} cannot take crops of {height}x{width} ({takes}); "
                f"change {flag}" + ("" if more else " or take a network for any size, as a ResNet")
            )
    backbone.train(was_training)


def _refusal(backbone: nn.Module, height: int, width: int) -> str:
    """Why a network fails on images of a size; empty if it does not."""
    try:
        backbone(next(backbone.parameters()).new_zeros(1, 3, height, width))
    except (AssertionError, RuntimeError, ValueError) as error:
        return first_line(error)
    return ""


def _nearest(arch: str) -> str:
    names = [*RESNETS, *TRUNKS, "conv4", "conv4w32", *torchvision.models.list_models(module=torchvision.models)]
    near = difflib.get_close_matches(arch.lower(), dict.fromkeys(names), n=3, cutoff=0.4)
    return f"; nearest: {', '.join(near)}" if near else "; use resnet50, conv4, a torchvision model or timm:NAME"


class MultiCropNet(Network):
    """Backbone, projection head and prototypes over crops of several sizes (Caron et al. 2020, section 3.2).

    Args:
        backbone: module with attribute feature_dim from images to features.
        head: module from features to embeddings.
        prototype_layers: one Linear, or `MultiPrototypes`.
        normalize: scale embeddings to unit length.
    """

    net = "multicrop"

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        prototype_layers: nn.Linear | MultiPrototypes,
        normalize: bool = True,
    ) -> None:
        super().__init__(backbone)
        self.projection_head = head
        self.prototypes = prototype_layers
        self.normalize = normalize

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor | list[Tensor]]:
        """Embeddings and prototype scores of all crops.

        Args:
            crops: V tensors B x 3 x h x w.

        Returns:
            z_ND of unit rows and scores_NK (a list of them with several prototype layers), at least float32;
            row v * B + b belongs to crop v of image b.
        """
        # Scores feed exp(score / 0.05): half precision would cost the assignment, and this product is cheap.
        with self.full_precision(self.projection_head(self.features(crops))) as z_ND:
            z_ND = F.normalize(z_ND, dim=1) if self.normalize else z_ND
            return z_ND, self.prototypes(z_ND)

    def scores(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """Scores N x K of every prototype layer."""
        scores = self.forward(crops)[1]
        return [scores] if isinstance(scores, Tensor) else scores

    def record(self) -> dict[str, Any]:
        """See `Network.record`."""
        layers = [layer for layer in self.projection_head.modules() if isinstance(layer, nn.Linear)]
        norms = [layer for layer in self.projection_head.modules() if isinstance(layer, _BatchNorm)]
        numbers = [layer.out_features for layer in self.prototype_layers()]
        return {
            **super().record(),
            "hidden_mlp": layers[0].out_features if len(layers) > 1 else 0,
            "feat_dim": layers[-1].out_features if layers else 0,
            "nmb_prototypes": numbers[0] if isinstance(self.prototypes, nn.Linear) else numbers,
            "head_bn": len(layers) < 2 or bool(norms),
            "normalize": self.normalize,
        }

    def prototype_layers(self) -> list[nn.Linear]:
        """The prototype layers, one or several."""
        return [self.prototypes] if isinstance(self.prototypes, nn.Linear) else list(self.prototypes)

    def normalize_prototypes(self) -> None:
        """Scale every prototype to unit length, in place and without gradient."""
        for layer in self.prototype_layers():
            normalize_rows_(layer)


def build_model(
    arch: str,
    stem: str,
    hidden_mlp: int,
    feat_dim: int,
    nmb_prototypes: int | Iterable[int],
    head_bn: bool = True,
    normalize: bool = True,
) -> MultiCropNet:
    """Network with projection head and prototypes.

    Args:
        arch: see `build_backbone`.
        stem: see `build_backbone`.
        hidden_mlp: width of the head's hidden layer; 0 for a single Linear.
        feat_dim: embedding size D; 0 for no head.
        nmb_prototypes: K, or one K per prototype layer; 0 for none.
        head_bn: BatchNorm in the head; the published w5 model goes without.
        normalize: scale embeddings to unit length.

    Raises:
        UserError: unknown architecture or a size below zero.
    """
    numbers = nmb_prototypes if isinstance(nmb_prototypes, int) else tuple(nmb_prototypes)
    _check_sizes(hidden_mlp, feat_dim, numbers)
    backbone = build_backbone(arch, stem)
    feature_dim = int(backbone.feature_dim)  # type: ignore[arg-type]
    head = projection_head(feature_dim, hidden_mlp, feat_dim, head_bn)
    return MultiCropNet(backbone, head, prototypes(feat_dim or feature_dim, numbers), normalize)


def _check_sizes(hidden_mlp: int, feat_dim: int, numbers: int | tuple[int, ...]) -> None:
    if hidden_mlp < 0 or feat_dim < 0:
        raise UserError(f"--hidden_mlp {hidden_mlp} --feat_dim {feat_dim}: sizes must not be negative")
    if min((numbers,) if isinstance(numbers, int) else (*numbers, 1)) < 0:
        raise UserError(f"--nmb_prototypes {numbers}: numbers of prototypes must not be negative")
    if not isinstance(numbers, int) and 0 in numbers:
        raise UserError(f"--nmb_prototypes {' '.join(map(str, numbers))}: every prototype layer needs at least 1")
