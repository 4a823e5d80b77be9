"""The linear evaluation as SwAV published it: a classifier trained by SGD on a frozen network.

Legend of suffixes: B images of a step on this rank, F features, C classes, N images, h w map height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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


@torch.no_grad()
def init_linear(linear: nn.Linear, init: str, generator: torch.Generator) -> None:
    """Initial weights of a classifier.

    "normal": standard deviation 0.01, biases 0 (SwAV, Self-Classifier); "xavier": uniform by fan-in and fan-out, biases
    0 (SeLa's probes); "default": weights and biases uniform by fan-in, as the framework's (DeepCluster).
    """
    bound = 1 / math.sqrt(linear.in_features)
    linear.bias.zero_()
    if init == "normal":
        linear.weight.normal_(0, 0.01, generator=generator)
    elif init == "xavier":
        nn.init.xavier_uniform_(linear.weight, generator=generator)
    else:
        linear.weight.uniform_(-bound, bound, generator=generator)
        linear.bias.uniform_(-bound, bound, generator=generator)


class LinearClassifier(nn.Module):
    """One linear layer on what `Pooled` gives, with the published names (`linear`, `bn`).

    Args:
        shape: shape of one image's pooled features: (F,), or (F, h, w) without global pooling.
        num_classes: C.
        use_bn: BatchNorm before the linear layer; published, and of effect, without global pooling only.
        init: of the weights, see `init_linear`.
        seed: seed of the initial weights.
    """

    def __init__(
        self, shape: Sequence[int], num_classes: int, *, use_bn: bool = False, init: str = "normal", seed: int = 0
    ) -> None:
        super().__init__()
        self.bn = SyncedBatchNorm2d(shape[0]) if use_bn and len(shape) == 3 else None
        self.linear = nn.Linear(math.prod(shape), num_classes)
        init_linear(self.linear, init, torch.Generator().manual_seed(seed))

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


class Scores(NamedTuple):
    """How a classifier does on some images."""

    loss: float
    """mean cross-entropy in nats"""
    top1: float
    """percent"""
    top5: float
    """percent"""


def train_epoch(
    classifier: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[Step], device: torch.device
) -> Scores:  # fmt: skip
    """Train one classifier for one epoch; see `train_probes`."""
    return train_probes(classifier, optimizer, steps, device)[0]


def train_probes(
    classifier: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[Step], device: torch.device,
    before_step: Callable[[int], None] = lambda number: None,
) -> list[Scores]:  # fmt: skip
    """Train for one epoch; every step is the gradient of the mean loss over all ranks' rows.

    Args:
        classifier: gives logits B x C, or B x L x C of L classifiers, whose losses are summed.
        optimizer: of its parameters.
        steps: of the epoch.
        device: where the classifier is.
        before_step: called with the number of each step, from 0; sets learning rates.

    Returns:
        For each classifier its scores over the images of all ranks as they were trained on.

    Raises:
        UserError: the loss is not finite.
    """
    classifier.train()
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    sums: Tensor | None = None
    for number, (features, labels, total) in enumerate(steps):
        before_step(number)
        logits_BLC = _by_classifier(classifier(features.to(device, non_blocking=True)))
        labels = labels.to(device, non_blocking=True)
        losses_L = _losses(logits_BLC, labels)
        optimizer.zero_grad()
        (losses_L.sum() / total).backward()
        _sum_gradients(parameters)
        optimizer.step()
        counted = _counted(losses_L, logits_BLC, labels)
        sums = counted if sums is None else sums + counted
    return _averages(sums, "training")


@torch.no_grad()
def evaluate_probes(
    classifier: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, crops: str = "",
) -> list[Scores]:  # fmt: skip
    """Scores of each classifier over the images of all ranks; each rank passes its own.

    Args:
        classifier: see `train_probes`.
        batches: features B x ... and labels B; with `crops` features B x V x ... of V crops of each image.
        device: where the classifier is.
        crops: "softmax": probabilities are averaged over the crops and the loss is that of the middle one, number 4 of
            ten (DeepCluster); "logits": logits are averaged (SeLa); empty: one crop.
    """
    classifier.eval()
    sums: Tensor | None = None
    for features, labels in batches:
        features, labels = features.to(device), labels.to(device)
        if not crops:
            logits_BLC = scores_BLC = _by_classifier(classifier(features))
        else:
            logits_BVLC = _by_classifier(classifier(features.flatten(0, 1))).unflatten(0, features.shape[:2])
            scores_BLC = (logits_BVLC.softmax(3) if crops == "softmax" else logits_BVLC).mean(1)
            logits_BLC = logits_BVLC[:, _PLAIN_CENTRE] if crops == "softmax" else scores_BLC
        counted = _counted(_losses(logits_BLC, labels), scores_BLC, labels)
        sums = counted if sums is None else sums + counted
    return _averages(sums, "validation")


_PLAIN_CENTRE = 4


def _hits(logits_BC: Tensor, labels_B: Tensor, ks: Sequence[int] = (1, 5)) -> list[Tensor]:
    """Numbers of rows whose class is among the k highest logits, for each k, then the number of rows; float64."""
    order = logits_BC.detach().topk(min(max(ks), logits_BC.shape[1]), dim=1).indices == labels_B[:, None]
    counts = [order[:, :k].sum().double() for k in ks]
    return [*counts, torch.tensor(float(len(labels_B)), dtype=torch.float64, device=logits_BC.device)]


def _by_classifier(logits: Tensor) -> Tensor:
    return logits if logits.ndim == 3 else logits[:, None]


def _losses(logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
    """Cross-entropy of each classifier, summed over the rows, [L]."""
    return torch.stack([F.cross_entropy(logits, labels_B, reduction="sum") for logits in logits_BLC.unbind(1)])


def _counted(losses_L: Tensor, logits_BLC: Tensor, labels_B: Tensor) -> Tensor:
    """Of each classifier: loss, hits among the first, hits among the first five, rows; float64 [L, 4]."""
    hits = torch.stack([torch.stack(_hits(logits, labels_B)) for logits in logits_BLC.unbind(1)])
    return torch.cat([losses_L.detach().double()[:, None], hits], dim=1)


def _sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over the ranks, all of them in one exchange."""
    if dist.size() == 1:
        return
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert len(grads) == len(parameters)
    total = dist.all_reduce_(torch.cat([grad.flatten() for grad in grads]))
    for grad, part in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def _averages(sums_L4: Tensor | None, what: str) -> list[Scores]:
    """Averages over the rows of all ranks; a rank without any learns the number of classifiers from the others."""
    number = int(dist.all_reduce_(torch.tensor(0 if sums_L4 is None else len(sums_L4)), "max"))
    sums_L4 = torch.zeros(number, 4, dtype=torch.float64) if sums_L4 is None else sums_L4.cpu()
    found = dist.all_reduce_(sums_L4).tolist()
    if not all(math.isfinite(loss) for loss, *_ in found):
        raise UserError(f"the {what} loss is not finite; lower --lr. The last checkpoint is kept")
    return [Scores(loss / rows, 100.0 * top1 / rows, 100.0 * top5 / rows) for loss, top1, top5, rows in found]
