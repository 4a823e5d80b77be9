"""Self-Classifier's network: backbone, MLP head, weight-normalised classifiers (Amrani et al. 2022, section 3).

Legend of suffixes: V crops, B images, N = V * B rows, F features, D embedding size, K classes of a classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clusterssl.errors import UserError
from clusterssl.models.build import build_backbone
from clusterssl.models.network import Network


class MLPHead(nn.Module):
    """Linear layers with activations between them; weights truncated normal with std 0.02, biases 0.

    Args:
        in_dim: features of the backbone.
        num_hidden: number of Linear layers; 0 makes the head the identity.
        hidden_dim: width between them.
        dim: size of the embedding.
        use_bn: BatchNorm after every hidden layer.
        no_leaky: ReLU instead of LeakyReLU of slope 0.01.
    """

    def __init__(
        self,
        in_dim: int,
        num_hidden: int = 2,
        hidden_dim: int = 4096,
        dim: int = 128,
        use_bn: bool = True,
        no_leaky: bool = False,
    ) -> None:
        super().__init__()
        self.options = {
            "num_hidden": num_hidden, "hidden_dim": hidden_dim, "dim": dim, "use_bn": use_bn, "no_leaky": no_leaky,
        }  # fmt: skip
        self.out_dim = dim if num_hidden else in_dim
        widths = [in_dim, *[hidden_dim] * (num_hidden - 1), dim]
        layers: list[nn.Module] = []
        for i in range(num_hidden - 1):
            norm = [nn.BatchNorm1d(hidden_dim)] if use_bn else []
            layers += [nn.Linear(widths[i], widths[i + 1]), *norm, nn.ReLU() if no_leaky else nn.LeakyReLU(0.01)]
        last = nn.Linear(widths[-2], dim) if num_hidden else nn.Identity()
        self.mlp = nn.Sequential(*layers, last) if layers else last
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x_NF: Tensor) -> Tensor:
        """Embeddings N x dim, not yet of unit length."""
        return self.mlp(x_NF)


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose row k is weight_g[k] * weight_v[k] / |weight_v[k]| (Salimans & Kingma 2016).

    Args:
        in_features: D.
        out_features: K.
        fixed: neither lengths nor directions are trained.
    """

    def __init__(self, in_features: int, out_features: int, fixed: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_g = nn.Parameter(torch.ones(out_features, 1), requires_grad=not fixed)
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features), requires_grad=not fixed)
        nn.init.uniform_(self.weight_v, -(in_features**-0.5), in_features**-0.5)

    @property
    def weight(self) -> Tensor:
        """The rows K x D as they are applied."""
        return self.weight_g * F.normalize(self.weight_v, dim=1)

    def forward(self, e_ND: Tensor) -> Tensor:
        """Logits N x K."""
        return F.linear(e_ND, self.weight)


class SelfClassifierNet(Network):
    """Backbone, MLP head and several classifiers, with the published parameter names.

    Args:
        backbone: module with attribute feature_dim from images to features.
        head: `MLPHead` on these features.
        cls_size: K of every classifier, `cls_0`, `cls_1`, ...; empty for none.
        fixed_cls: the classifiers keep their random weights.

    Raises:
        UserError: a classifier without classes.
    """

    net = "selfclassifier"
    published_backbone = "backbone."

    def __init__(self, backbone: nn.Module, head: MLPHead, cls_size: Sequence[int], fixed_cls: bool = False) -> None:
        super().__init__(backbone)
        if min(cls_size, default=1) < 1:
            raise UserError(f"--cls_size {' '.join(map(str, cls_size))}: every classifier needs at least 1 class")
        self.mlp_head = head
        self.cls_size = tuple(cls_size)
        self.fixed_cls = fixed_cls
        for i, size in enumerate(self.cls_size):
            self.add_module(f"cls_{i}", WeightNormLinear(head.out_dim, size, fixed_cls))

    def classifiers(self) -> list[WeightNormLinear]:
        """The classifiers, none, one or several."""
        return [getattr(self, f"cls_{i}") for i in range(len(self.cls_size))]

    def embeddings(self, crops: Sequence[Tensor]) -> Tensor:
        """Embeddings e_ND = x / max(|x|, 1e-7) of all crops, at least float32; row v * B + b is crop v of image b."""
        with self.full_precision(self.mlp_head(self.features(crops))) as x_ND:
            return F.normalize(x_ND, dim=1, eps=1e-7)

    def classify(self, e_ND: Tensor) -> list[Tensor]:
        """Logits N x K of each classifier, at least float32."""
        with self.full_precision(e_ND) as e_ND:
            return [classifier(e_ND) for classifier in self.classifiers()]

    def forward(
        self, crops: Sequence[Tensor], replace: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Embeddings and logits of all crops.

        Args:
            crops: V tensors B x 3 x h x w.
            replace: from the embeddings N x D to those that are classified in their place, such as nearest neighbours.

        Returns:
            e_ND of unit rows before `replace`, and logits_NK of each classifier, at least float32.
        """
        e_ND = self.embeddings(crops)
        return e_ND, self.classify(replace(e_ND) if replace else e_ND)

    def scores(self, crops: Sequence[Tensor]) -> list[Tensor]:
        """Logits N x K of every classifier."""
        return self.forward(crops)[1]

    def record(self) -> dict[str, Any]:
        """See `Network.record`."""
        sizes = {"cls_size": list(self.cls_size), "fixed_cls": self.fixed_cls}
        return {**super().record(), **self.mlp_head.options, **sizes}


def build_selfclassifier(
    arch: str,
    stem: str,
    cls_size: Sequence[int],
    num_hidden: int = 2,
    hidden_dim: int = 4096,
    dim: int = 128,
    use_bn: bool = True,
    no_leaky: bool = False,
    fixed_cls: bool = False,
) -> SelfClassifierNet:
    """Network by the name of its backbone, see `build_backbone`, with head and classifiers as in `SelfClassifierNet`.

    Raises:
        UserError: unknown architecture or an impossible size.
    """
    if num_hidden < 0 or min(hidden_dim, dim) < 1:
        raise UserError(f"--num_hidden {num_hidden} --hidden_dim {hidden_dim} --dim {dim}: sizes must be positive")
    backbone = build_backbone(arch, stem)
    in_dim = int(backbone.feature_dim)  # type: ignore[arg-type]
    head = MLPHead(in_dim, num_hidden, hidden_dim, dim, use_bn, no_leaky)
    return SelfClassifierNet(backbone, head, cls_size, fixed_cls)
