"""Residual networks with the parameter names, widths and initialisation of the published SwAV-family models.

Legend of suffixes: B images, C channels, H height, W width, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

Block = type["BasicBlock"] | type["Bottleneck"]


def conv2d(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    """Convolution without bias that keeps height and width when the stride is 1."""
    return nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5 left)."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv2d(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv2d(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, channels, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map B x in_channels x H x W to B x channels x H/stride x W/stride."""
        y_BCHW = self.relu(self.bn1(self.conv1(x_BCHW)))
        y_BCHW = self.bn2(self.conv2(y_BCHW))
        y_BCHW += x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        return self.relu(y_BCHW)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; the 3x3 convolution carries the stride."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = conv2d(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv2d(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv2d(channels, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map B x in_channels x H x W to B x 4 channels x H/stride x W/stride."""
        y_BCHW = self.relu(self.bn1(self.conv1(x_BCHW)))
        y_BCHW = self.relu(self.bn2(self.conv2(y_BCHW)))
        y_BCHW = self.bn3(self.conv3(y_BCHW))
        y_BCHW += x_BCHW if self.downsample is None else self.downsample(x_BCHW)
        return self.relu(y_BCHW)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv2d(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


def init_convolutions(module: nn.Module) -> None:
    """Published initialisation: convolutions normal with std sqrt(2 / (k * k * out_channels))."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def _stage(block: Block, in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = block(in_channels, channels, stride)
    return nn.Sequential(first, *(block(channels * block.expansion, channels) for _ in range(num_blocks - 1)))


class ResNet(nn.Module):
    """Residual network without classifier.

    Args:
        block: residual block.
        layers: number of blocks in each of the four stages.
        width: factor on every channel count, the stem's 64 included.
        stem: "imagenet" (7x7 convolution of stride 2, max-pool) or "small" (3x3 of stride 1, no pool).
    """

    def __init__(self, block: Block, layers: Sequence[int], width: int = 1, stem: str = "imagenet") -> None:
        super().__init__()
        base = 64 * width
        self.feature_dim = base * 8 * block.expansion
        self.conv1 = conv2d(3, base, 7, 2) if stem == "imagenet" else conv2d(3, base, 3)
        self.bn1 = nn.BatchNorm2d(base)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        self.layer1 = _stage(block, base, base, layers[0], stride=1)
        self.layer2 = _stage(block, base * block.expansion, base * 2, layers[1], stride=2)
        self.layer3 = _stage(block, base * 2 * block.expansion, base * 4, layers[2], stride=2)
        self.layer4 = _stage(block, base * 4 * block.expansion, base * 8, layers[3], stride=2)
        init_convolutions(self)

    def forward_map(self, x_BCHW: Tensor) -> Tensor:
        """Feature map before pooling: B x feature_dim x H/32 x W/32 (H/8 x W/8 with the small stem), rounded up."""
        x_BCHW = self.maxpool(self.relu(self.bn1(self.conv1(x_BCHW))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x_BCHW))))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Globally average-pooled features, B x feature_dim, of images B x 3 x H x W."""
        return self.forward_map(x_BCHW).mean((2, 3))


_VARIANTS: dict[str, tuple[Block, tuple[int, ...], int]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), 1),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 1),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 1),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 1),
    "resnet152": (Bottleneck, (3, 8, 36, 3), 1),
    "resnet50w2": (Bottleneck, (3, 4, 6, 3), 2),
    "resnet50w4": (Bottleneck, (3, 4, 6, 3), 4),
    "resnet50w5": (Bottleneck, (3, 4, 6, 3), 5),
}
RESNETS = tuple(_VARIANTS)


def resnet(arch: str, stem: str = "imagenet") -> ResNet:
    """Residual network by its name, one of `RESNETS`."""
    block, layers, width = _VARIANTS[arch]
    return ResNet(block, layers, width, stem)


def shape_of(arch: str) -> tuple[bool, tuple[int, ...], int]:
    """What tells the networks apart: bottleneck blocks or not, blocks of each stage, channels of the stem."""
    block, layers, width = _VARIANTS[arch]
    return block is Bottleneck, layers, 64 * width
