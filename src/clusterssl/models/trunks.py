"""AlexNet and VGG-16 with BatchNorm as DeepCluster and SeLa trained them, with their parameter names.

Caron et al. 2018, section 4.1; Asano et al. 2020, section 4.
Legend of suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from clusterssl.models.resnet import init_convolutions
from clusterssl.models.sobel import Sobel


class ConvTrunk(nn.Module):
    """Convolutions and two large linear layers; the output is what the second one gives, before its ReLU.

    Submodules `features`, `classifier` and, with `sobel`, the fixed filters `sobel`. Convolutions start normal with
    std sqrt(2 / (k * k * out_channels)), linear layers normal with std 0.01, all biases 0.

    Args:
        features: convolutional layers; their output is flattened.
        classifier: layers up to the second linear one.
        sobel: put the edge filters before the convolutions, which then have two input channels.
    """

    feature_dim = 4096

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential, sobel: bool) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier
        self.sobel = Sobel() if sobel else None
        init_convolutions(self)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward_map(self, x_BCHW: Tensor) -> Tensor:
        """Feature map before the linear layers, of images B x 3 x H x W."""
        return self.features(x_BCHW if self.sobel is None else self.sobel(x_BCHW))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features B x 4096, before the last ReLU, of images B x 3 x 224 x 224."""
        return self.classifier(self.forward_map(x_BCHW).flatten(1))


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1, padding: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, size, stride, padding)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def alexnet(widths: Sequence[int] = (96, 256, 384, 384, 256), sobel: bool = False) -> ConvTrunk:
    """AlexNet with BatchNorm instead of local response normalisation, for images of 224 x 224.

    Args:
        widths: output channels of the five convolutions.
        sobel: see `ConvTrunk`.
    """
    a, b, c, d, e = widths
    features = nn.Sequential(
        *_conv(2 if sobel else 3, a, 11, 4, 2), nn.MaxPool2d(3, 2),
        *_conv(a, b, 5, 1, 2), nn.MaxPool2d(3, 2),
        *_conv(b, c, 3), *_conv(c, d, 3), *_conv(d, e, 3), nn.MaxPool2d(3, 2),
    )  # fmt: skip
    classifier = nn.Sequential(
        nn.Dropout(0.5), nn.Linear(36 * e, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4096, 4096)
    )
    return ConvTrunk(features, classifier, sobel)


def vgg16(sobel: bool = False) -> ConvTrunk:
    """VGG-16 with BatchNorm, for images of 224 x 224; `sobel` as in `ConvTrunk`."""
    layers: list[nn.Module] = []
    channels = 2 if sobel else 3
    for width, number in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(number):
            layers += _conv(channels, width, 3)
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    classifier = nn.Sequential(nn.Linear(49 * 512, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4096, 4096))
    return ConvTrunk(nn.Sequential(*layers), classifier, sobel)


def absorb_batchnorm(features: nn.Sequential) -> nn.Sequential:
    """The same layers in evaluation mode, every BatchNorm folded into the convolution before it; nothing is shared."""
    layers: list[nn.Module] = []
    for layer in features:
        if isinstance(layer, nn.BatchNorm2d) and isinstance(layers[-1], nn.Conv2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1].eval(), layer.eval())
        else:
            layers.append(layer)
    return nn.Sequential(*layers).eval()
