"""Linear probes on the inside of a network: what each convolution or stage knows, all read in one pass.

Zhang et al. 2017 (arXiv 1611.09842), section 3; Caron et al. 2018, table 1; Asano et al. 2020, table 4.

Legend of suffixes: B images, C channels, h w map height and width, F features, L layers, K classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clusterssl.errors import UserError
from clusterssl.evals.classifier import SyncedBatchNorm2d, init_linear
from clusterssl.models.convnet import ConvNet4
from clusterssl.models.sela_resnet import NumberedTrunk
from clusterssl.models.trunks import ConvTrunk

_ALEXNET_POOLS = {"conv1": (6, 6, 3), "conv2": (4, 4, 0), "conv3": (3, 3, 1), "conv4": (3, 3, 1), "conv5": (2, 2, 0)}
"""window, stride and padding that leave about 9,600 features of images of 224 pixels"""
_ABOUT = 9600


class LayerFeatures(nn.Module):
    """Pooled features after some layers of a frozen network, side by side.

    Args:
        backbone: network; "conv1" ... are the outputs of the first, second, ... ReLU of AlexNet, VGG and conv4,
            "layer1" ... "layer4" those of the stages of a ResNet; other names are submodules.
        layers: which.
        pooling: "avg" or "max": the published windows for AlexNet, else a grid that leaves about 9,600 features.
        image_size: height and width of the images, for the sizes.

    Raises:
        UserError: no such layer, or one without a feature map.
    """

    def __init__(
        self, backbone: nn.Module, layers: Sequence[str], *, pooling: str = "avg", image_size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.backbone, self.layers, self.pooling = backbone, tuple(layers), pooling
        self._caught: dict[str, Tensor] = {}
        for layer in self.layers:
            module, before = place(backbone, layer)
            if before:
                module.register_forward_pre_hook(lambda _, inputs, name=layer: self._catch(name, inputs[0]))
            else:
                module.register_forward_hook(lambda _, inputs, output, name=layer: self._catch(name, output))
        was_training = backbone.training
        like = next(backbone.parameters())
        with torch.no_grad():
            backbone.eval()(like.new_zeros(1, 3, *image_size))
        backbone.train(was_training)
        self.shapes = {layer: tuple(self._taken(layer).shape[1:]) for layer in self.layers}

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Features B x F, those of the layers one after the other; `shapes` tells C x h x w of each."""
        self.backbone(images_B3HW)
        return torch.cat([self._taken(layer).flatten(1) for layer in self.layers], dim=1)

    def _catch(self, layer: str, map_BChw: Any) -> None:
        if not isinstance(map_BChw, Tensor) or map_BChw.ndim != 4:
            raise UserError(f"--layers {layer}: gives no feature map; choose {_known(self.backbone)}")
        if isinstance(self.backbone, ConvNet4):  # its last ReLU is no module, the hook comes before it
            map_BChw = F.relu(map_BChw)
        self._caught[layer] = self._pooled(layer, map_BChw)

    def _taken(self, layer: str) -> Tensor:
        if layer not in self._caught:
            raise UserError(f"--layers {layer}: the network does not pass through it; choose {_known(self.backbone)}")
        return self._caught.pop(layer)

    def _pooled(self, layer: str, map_BChw: Tensor) -> Tensor:
        if isinstance(self.backbone, ConvTrunk) and _convolutions(self.backbone) == len(_ALEXNET_POOLS):
            window, stride, padding = _ALEXNET_POOLS[layer]
            pool = F.avg_pool2d if self.pooling == "avg" else F.max_pool2d
            return pool(map_BChw, window, stride, padding)
        grid = max(1, math.isqrt(_ABOUT // map_BChw.shape[1]))
        size = (min(grid, map_BChw.shape[2]), min(grid, map_BChw.shape[3]))
        adaptive = F.adaptive_avg_pool2d if self.pooling == "avg" else F.adaptive_max_pool2d
        return adaptive(map_BChw, size)


def place(backbone: nn.Module, layer: str) -> tuple[nn.Module, bool]:
    """The submodule whose output is the layer; or whose input is, then True.

    Raises:
        UserError: no such layer.
    """
    number = int(found[1]) if (found := re.fullmatch(r"(?:conv|layer)([1-9]\d*)", layer)) else 0
    if isinstance(backbone, ConvNet4) and layer in ("conv1", "conv2", "conv3", "conv4"):
        return (backbone.bn4, False) if number == 4 else (backbone.get_submodule(f"conv{number + 1}"), True)
    if isinstance(backbone, ConvTrunk) and layer.startswith("conv") and 0 < number <= _convolutions(backbone):
        return [module for module in backbone.features if isinstance(module, nn.ReLU)][number - 1], False
    if isinstance(backbone, NumberedTrunk) and layer.startswith("layer") and 0 < number <= 4:
        return [module for module in backbone.features if isinstance(module, nn.Sequential)][number - 1], False
    try:
        if layer and not isinstance(backbone, (ConvNet4, ConvTrunk)):
            return backbone.get_submodule(layer), False
    except AttributeError:
        pass
    raise UserError(f"--layers {layer}: no such layer in this architecture; choose {_known(backbone)}")


def _convolutions(trunk: ConvTrunk) -> int:
    return sum(isinstance(module, nn.ReLU) for module in trunk.features)


def _known(backbone: nn.Module) -> str:
    """The layers that can be named, in words."""
    if isinstance(backbone, (ConvNet4, ConvTrunk)):
        return f"conv1 to conv{4 if isinstance(backbone, ConvNet4) else _convolutions(backbone)}"
    stages = isinstance(backbone, NumberedTrunk) or hasattr(backbone, "layer4")
    return "layer1 to layer4" if stages else "the name of a submodule that gives a map"


class Probes(nn.Module):
    """One linear classifier for each layer, on what `LayerFeatures` gives.

    Args:
        shapes: C x h x w of each layer.
        num_classes: K.
        batch_norm: BatchNorm without parameters before each classifier (SeLa).
        init: of the weights, see `init_linear`.
        seed: of the initial weights.
    """

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], num_classes: int, *, batch_norm: bool = False, init: str = "normal",
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.shapes = {layer: tuple(shape) for layer, shape in shapes.items()}
        generator = torch.Generator().manual_seed(seed)
        self.linear = nn.ModuleDict()
        self.bn = nn.ModuleDict()
        for layer, shape in self.shapes.items():
            linear = nn.Linear(math.prod(shape), num_classes)
            init_linear(linear, init, generator)
            self.linear[_key(layer)] = linear
            if batch_norm:
                self.bn[_key(layer)] = SyncedBatchNorm2d(shape[0], affine=False)

    def forward(self, x_BF: Tensor) -> Tensor:
        """Logits B x L x K."""
        logits = []
        parts = x_BF.split([math.prod(shape) for shape in self.shapes.values()], dim=1)
        for (layer, shape), part_BF in zip(self.shapes.items(), parts, strict=True):
            if self.bn:
                part_BF = self.bn[_key(layer)](part_BF.unflatten(1, shape)).flatten(1)
            logits.append(self.linear[_key(layer)](part_BF))
        return torch.stack(logits, dim=1)


def _key(layer: str) -> str:
    return layer.replace(".", "_")


def track_batches(network: nn.Module) -> list[SyncedBatchNorm2d]:
    """Replace the BatchNorm layers of a frozen network by ones that, in training mode, use the statistics of the batch.

    Asano et al. 2020 trained their linear classifiers of ResNets so; the running statistics move along.

    Returns:
        The new layers, which share parameters and statistics with the old ones.
    """
    found = []
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            synced = SyncedBatchNorm2d(layer.num_features, layer.eps, layer.momentum, layer.affine)
            synced.weight, synced.bias = layer.weight, layer.bias
            synced.running_mean, synced.running_var = layer.running_mean, layer.running_var
            synced.num_batches_tracked = layer.num_batches_tracked
            network.set_submodule(name, synced.to(next(network.parameters()).device).eval())
            found.append(synced)
    return found
