"""The linear evaluation as SwAV published it: a classifier trained by SGD on a frozen network.

Legend of suffixes: B images of a step on this rank, F features, C classes, N images, h w map height and width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clusterssl import dist
from clusterssl.errors import UserError
from clusterssl.rng import Stream, permutation

_SPATIAL_POOL = 6


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the images of all ranks, for inputs that need no gradient (those of a frozen network).

    Unlike SyncBatchNorm it works on CPUs and with ranks that have no image in the last step.
    """

    def forward(self, x_BFhw: Tensor) -> Tensor:
        """Normalise B x F x h x w by the statistics of the step, or by the running ones in evaluation mode."""
        if not self.training:
            return super().forward(x_BFhw)
        rows = x_BFhw.detach().double().transpose(0, 1).flatten(1)
        sums = torch.cat([rows.new_full((1,), rows.shape[1]), rows.sum(1), rows.square().sum(1)])
        count, total, squares = dist.all_reduce_(sums).split([1, self.num_features, self.num_features])
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        unbiased = variance * count / (count - 1).clamp(min=1)
        momentum = 0.1 if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var), momentum)
        self.num_batches_tracked += 1
        return F.batch_norm(x_BFhw, mean.to(x_BFhw), variance.to(x_BFhw), self.weight, self.bias, eps=self.eps)


class LinearClassifier(nn.Module):
    """One linear layer on what `Pooled` gives, with the published names (`linear`, `bn`) and initialisation.

    Args:
        shape: shape of one image's pooled features: (F,), or (F, h, w) without global pooling.
        num_classes: C.
        use_bn: BatchNorm before the linear layer; published, and of effect, without global pooling only.
        seed: seed of the initial weights.
    """

    def __init__(self, shape: Sequence[int], num_classes: int, *, use_bn: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.bn = SyncedBatchNorm2d(shape[0]) if use_bn and len(shape) == 3 else None
        self.linear = nn.Linear(math.prod(shape), num_classes)
        nn.init.normal_(self.linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_BF: Tensor) -> Tensor:
        """Logits B x C of pooled features B x F or B x F x h x w."""
        if self.bn is not None:
            x_BF = self.bn(x_BF)
        return self.linear(x_BF.flatten(1))


class Pooled(nn.Module):
    """A frozen backbone and the pooling in front of the classifier.

    Args:
        backbone: network with `forward` to pooled features and `forward_map` to the map before.
        global_pooling: average over the whole map; else 6 x 6 windows of stride 1, 2 x 2 x F for 7 x 7 x F.
    """

    def __init__(self, backbone: nn.Module, *, global_pooling: bool = True) -> None:
        super().__init__()
        if not global_pooling and not hasattr(backbone, "forward_map"):
            raise UserError("--global_pooling false: this architecture gives no feature map; use a resnet")
        self.backbone = backbone
        self.global_pooling = global_pooling

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Pooled features B x F, or B x F x h x w without global pooling.

        Raises:
            UserError: the map is smaller than the 6 x 6 window.
        """
        if self.global_pooling:
            return self.backbone(images_B3HW)
        map_BFhw = self.backbone.forward_map(images_B3HW)  # type: ignore[operator]
        if min(map_BFhw.shape[-2:]) < _SPATIAL_POOL:
            size = "x".join(map(str, map_BFhw.shape[-2:]))
            raise UserError(f"--global_pooling false: needs a map of 6x6 or more, got {size}; raise --image_size")
        return F.avg_pool2d(map_BFhw, _SPATIAL_POOL, stride=1)


def epoch_lr(
    epoch: int, *, scheduler_type: str, lr: float, epochs: int, decay_epochs: Sequence[int] = (), gamma: float = 0.1,
    final_lr: float = 0.0,
) -> float:  # fmt: skip
    """Learning rate in force during an epoch, counted from 0.

    "cosine": final_lr + (lr - final_lr)(1 + cos(pi epoch / epochs)) / 2. "step": lr times gamma for each of
    `decay_epochs` reached.
    """
    if scheduler_type == "cosine":
        return final_lr + (lr - final_lr) * (1 + math.cos(math.pi * epoch / epochs)) / 2
    return lr * gamma ** sum(epoch >= decay for decay in decay_epochs)


class Step(NamedTuple):
    """This rank's rows of one training step; `total` counts the rows of all ranks."""

    features: Tensor
    labels: Tensor
    total: int


def epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    """Random order of all images in an epoch, int64 [size]: a function of its arguments alone."""
    return torch.from_numpy(permutation(seed, Stream.ORDER, epoch, size))


def rows_of_steps(order_N: Tensor, batch_size: int) -> Iterator[tuple[Tensor, int]]:
    """This rank's positions in each step and the number of positions of all ranks.

    Steps have batch_size x ranks images; the last one what is left, of which a rank may get none. The images of a
    step do not depend on how many ranks share it.
    """
    for rows in order_N.split(batch_size * dist.size()):
        start, stop = dist.share(len(rows))
        yield rows[start:stop], len(rows)


def steps_in_memory(features_NF: Tensor, labels_N: Tensor, order_N: Tensor, batch_size: int) -> Iterator[Step]:
    """Training steps over features kept in memory."""
    for rows, total in rows_of_steps(order_N, batch_size):
        rows = rows.to(features_NF.device)
        yield Step(features_NF[rows], labels_N[rows], total)


def train_epoch(
    classifier: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[Step], device: torch.device
) -> tuple[float, float, float]:
    """Train the classifier for one epoch; every step is the gradient of the mean loss over all ranks' rows.

    Returns:
        Mean loss in nats, top-1 and top-5 in percent, all over the images of all ranks as they were trained on.

    Raises:
        UserError: the loss is not finite.
    """
    classifier.train()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for features, labels, total in steps:
        features, labels = features.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits_BC = classifier(features)
        loss = F.cross_entropy(logits_BC, labels, reduction="sum")
        optimizer.zero_grad()
        (loss / total).backward()
        for parameter in classifier.parameters():
            assert parameter.grad is not None
            dist.all_reduce_(parameter.grad)
        optimizer.step()
        sums += torch.stack([loss.detach().double(), *_hits(logits_BC, labels)])
    return _averages(sums, "training")


@torch.no_grad()
def evaluate(
    classifier: nn.Module, features_NF: Tensor, labels_N: Tensor, device: torch.device, batch_size: int = 1024
) -> tuple[float, float, float]:
    """Mean loss, top-1 and top-5 in percent over the rows of all ranks; each rank passes its own rows."""
    classifier.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    for features, labels in zip(features_NF.split(batch_size), labels_N.split(batch_size), strict=True):
        logits_BC, labels = classifier(features.to(device)), labels.to(device)
        loss = F.cross_entropy(logits_BC, labels, reduction="sum")
        sums += torch.stack([loss.double(), *_hits(logits_BC, labels)])
    return _averages(sums, "validation")


def topk_accuracy(logits_NC: Tensor, labels_N: Tensor, ks: Sequence[int] = (1, 5)) -> list[float]:
    """Share of images, in percent, whose class is among the k highest logits, for each k (at most C)."""
    return [100.0 * float(hits) / len(labels_N) for hits, _ in (_hits(logits_NC, labels_N, (k,)) for k in ks)]


def _hits(logits_BC: Tensor, labels_B: Tensor, ks: Sequence[int] = (1, 5)) -> list[Tensor]:
    """Numbers of rows whose class is among the k highest logits, for each k, then the number of rows; float64."""
    order = logits_BC.detach().topk(min(max(ks), logits_BC.shape[1]), dim=1).indices == labels_B[:, None]
    counts = [order[:, :k].sum().double() for k in ks]
    return [*counts, torch.tensor(float(len(labels_B)), dtype=torch.float64, device=logits_BC.device)]


def _averages(sums: Tensor, what: str) -> tuple[float, float, float]:
    loss, top1, top5, rows = dist.all_reduce_(sums).tolist()
    if not math.isfinite(loss):
        raise UserError(f"the {what} loss is not finite; lower --lr. The last checkpoint is kept")
    return loss / rows, 100.0 * top1 / rows, 100.0 * top5 / rows
