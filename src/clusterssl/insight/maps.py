"""Reading a layer's map while a network runs, whatever the architecture.

Legend of suffixes: B images, C channels, h w map height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clusterssl.errors import UserError
from clusterssl.evals.layers import place
from clusterssl.models.convnet import ConvNet4
from clusterssl.models.trunks import ConvTrunk


class Map:
    """The newest output of a layer."""

    raw_BChw: Tensor
    """before the ReLU, where the layer has none of its own"""

    def cut(self) -> Tensor:
        """B x C x h x w after a ReLU."""
        return F.relu(self.raw_BChw)


@contextmanager
def watched(backbone: nn.Module, layer: str) -> Iterator[Map]:
    """A layer's maps during the block, on the way of the gradient.

    Args:
        backbone: network.
        layer: "conv1", "layer1", ... as in the linear evaluations, or the name of a submodule.

    Raises:
        UserError: no such layer, or it gives no map.
    """
    found = Map()

    def take(output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise UserError(f"--layers {layer}: gives no feature map; choose another layer")
        found.raw_BChw = output.clone()
        return found.raw_BChw.clone()  # a ReLU that follows may work in place

    module, before = place(backbone, layer)
    if before:
        handle = module.register_forward_pre_hook(lambda _, inputs: take(inputs[0]))
    else:
        handle = module.register_forward_hook(lambda _, _inputs, output: take(output))
    try:
        yield found
    finally:
        handle.remove()


def usual_layers(backbone: nn.Module, image_size: tuple[int, int]) -> list[str]:
    """The layers of a known architecture, first to last; of any other the last submodule that gives a map.

    Raises:
        UserError: none gives a map.
    """
    if isinstance(backbone, ConvNet4):
        return [f"conv{i}" for i in range(1, 5)]
    if isinstance(backbone, ConvTrunk):
        number = sum(isinstance(module, nn.ReLU) for module in backbone.features)
        return [f"conv{i}" for i in range(1, number + 1)]
    if all(hasattr(backbone, f"layer{i}") for i in range(1, 5)):
        return [f"layer{i}" for i in range(1, 5)]
    names: list[str] = []
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: names.append(name) if _is_map(out) else None)
        for name, module in backbone.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            backbone.eval()(next(backbone.parameters()).new_zeros(1, 3, *image_size))
    finally:
        for handle in handles:
            handle.remove()
    if not names:
        raise UserError("no layer of this network gives a feature map; there is nothing to look at")
    return names[-1:]


def _is_map(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim == 4 and output.shape[1] > 3 and min(output.shape[2:]) > 1


def first_convolution(backbone: nn.Module) -> nn.Conv2d:
    """The convolution that sees the image, fixed edge filters left aside.

    Raises:
        UserError: there is none.
    """
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels in (2, 3) and module.out_channels > 2:
            return module
    raise UserError("no convolution of this network sees the image directly; there are no first filters to show")
