"""Four-layer convolutional network for tiny images and tests.

Legend of suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from clusterssl.models.resnet import init_convolutions

_NAME = re.compile(r"conv4(?:w([1-9][0-9]{0,3}))?")


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)


class ConvNet4(nn.Module):
    """Four 3x3 convolution - BatchNorm - ReLU blocks, max-pool after the first three, global average pool.

    Args:
        width: channels of the first block; the others have 2, 4 and 8 times as many.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.feature_dim = 8 * width
        self.conv1 = _conv(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, 2 * width)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.conv3 = _conv(2 * width, 4 * width)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.conv4 = _conv(4 * width, 8 * width)
        self.bn4 = nn.BatchNorm2d(8 * width)
        init_convolutions(self)

    def forward_map(self, x_BCHW: Tensor) -> Tensor:
        """Feature map before pooling, B x feature_dim x H//8 x W//8, of images of at least 8 x 8 pixels."""
        # Pooling first is the same as ReLU first and leaves a quarter of the elements to it.
        x_BCHW = F.relu(F.max_pool2d(self.bn1(self.conv1(x_BCHW)), 2), inplace=True)
        x_BCHW = F.relu(F.max_pool2d(self.bn2(self.conv2(x_BCHW)), 2), inplace=True)
        x_BCHW = F.relu(F.max_pool2d(self.bn3(self.conv3(x_BCHW)), 2), inplace=True)
        return F.relu(self.bn4(self.conv4(x_BCHW)), inplace=True)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Globally average-pooled features, B x feature_dim, of images B x 3 x H x W."""
        return self.forward_map(x_BCHW).mean((2, 3))


def is_convnet(arch: str) -> bool:
    """Whether `arch` is "conv4" or "conv4wN" with a base width N of 1 to 9999."""
    return _NAME.fullmatch(arch) is not None


def convnet(arch: str) -> ConvNet4:
    """Network by its name: "conv4" has base width 16, "conv4w32" has 32."""
    match = _NAME.fullmatch(arch)
    assert match is not None, arch
    return ConvNet4(int(match[1] or 16))
