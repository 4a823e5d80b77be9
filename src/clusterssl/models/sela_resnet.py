"""SeLa's two ResNet-50s, whose layers are numbered: before-activation ("v2") and after-activation ("v1").

Asano et al. 2020; He et al. 2016b for the former. Legend of suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from clusterssl.models.resnet import conv2d, resnet


class PreActBottleneck(nn.Module):
    """BatchNorm and ReLU before each of 1x1, 3x3, 1x1 convolution; the shortcut branches off after the first ReLU."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv2d(in_channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv2d(channels, channels, 3, stride)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = conv2d(channels, out_channels, 1)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Sequential(conv2d(in_channels, out_channels, 1, stride)) if changes else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map B x in_channels x H x W to B x 4 channels x H/stride x W/stride."""
        o_BCHW = F.relu(self.bn1(x_BCHW))
        y_BCHW = self.conv2(F.relu(self.bn2(self.conv1(o_BCHW))))
        y_BCHW = self.conv3(F.relu(self.bn3(y_BCHW)))
        return y_BCHW + (x_BCHW if self.shortcut is None else self.shortcut(o_BCHW))


class NumberedTrunk(nn.Module):
    """Layers in one sequence `features`, globally average-pooled.

    Args:
        features: from images to a feature map of 2048 channels.
    """

    feature_dim = 2048

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        self.features = features

    def forward_map(self, x_BCHW: Tensor) -> Tensor:
        """Feature map before pooling: B x 2048 x H/32 x W/32, rounded up."""
        return self.features(x_BCHW)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features B x 2048 of images B x 3 x H x W."""
        return self.forward_map(x_BCHW).mean((2, 3))


def resnetv2() -> NumberedTrunk:
    """Pre-activation ResNet-50 of the published 10x3k model; the framework's default initialisation."""
    stages: list[nn.Module] = []
    in_channels = 64
    for channels, number, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        blocks = [PreActBottleneck(in_channels, channels, stride)]
        in_channels = channels * PreActBottleneck.expansion
        blocks += [PreActBottleneck(in_channels, channels) for _ in range(number - 1)]
        stages.append(nn.Sequential(*blocks))
    return NumberedTrunk(nn.Sequential(conv2d(3, 64, 7, 2), nn.MaxPool2d(3, stride=2, padding=1), *stages))


def resnetv1() -> NumberedTrunk:
    """Post-activation ResNet-50 with numbered layers."""
    net = resnet("resnet50")
    return NumberedTrunk(
        nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4)
    )
