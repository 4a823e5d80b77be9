"""Several views of each image for evaluations: ten crops, random squares, whole images; nothing stands in for another.

Suffixes: B images of a batch, V views of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clusterssl.data.augment import MEAN, STD, normalize
from clusterssl.data.boxes import BOX_SLOTS, random_boxes, resized_crop
from clusterssl.data.dataset import Key
from clusterssl.data.decode import BadImageError
from clusterssl.data.evalset import centre_crop, resized
from clusterssl.data.loader import Guarded, checked, quiet_worker, same
from clusterssl.data.multicrop import MultiCrop
from clusterssl.data.params import Param
from clusterssl.data.source import Source
from clusterssl.errors import UserError

Cut = Callable[[Tensor, int, int], Tensor]
"""image uint8 [3, H, W], epoch, dataset position to views uint8 [V, 3, h, w]"""


def view_batches(
    source: Source,
    batches: Sequence[Sequence[Key]],
    cut: Cut,
    *,
    workers: int = 0,
    device: torch.device | str = "cpu",
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterates over batches of views.

    Args:
        source: images.
        batches: (epoch, dataset position) of the images of each batch, none of them empty.
        cut: from image to views; those of a batch must be of one size.
        workers: worker processes; 0: load in this process.
        device: where the views are normalised and delivered.
        mean, std: of the channels, for the normalisation.

    Yields:
        Views float32 [B, V, 3, h, w] and dataset positions int64 [B].

    Raises:
        UserError: an image cannot be read; a benchmark without it would be another benchmark.
    """
    loader: DataLoader[Any] = DataLoader(
        Guarded(_Views(source, cut)), batch_sampler=[list(batch) for batch in batches], collate_fn=same,
        num_workers=workers, pin_memory=torch.device(device).type == "cuda", worker_init_fn=quiet_worker,
        generator=torch.Generator(),
    )  # fmt: skip
    for views, index in checked(loader):
        flat = normalize(views.flatten(0, 1).to(device, non_blocking=True), mean, std)
        yield flat.unflatten(0, views.shape[:2]), index


class _Views(Dataset[Any]):
    def __init__(self, source: Source, cut: Cut) -> None:
        self.source = source
        self.cut = cut

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        views = torch.stack([self.cut(self._load(i), epoch, i) for epoch, i in keys])
        return views, torch.tensor([i for _, i in keys])

    def _load(self, i: int) -> Tensor:
        try:
            return self.source.load(i)
        except BadImageError as error:
            raise UserError(f"{self.source.name(i)}: {error}; repair it, the result would not be comparable") from error


@dataclass(frozen=True)
class TenCrops:
    """Four corners and the centre, then the same of the mirror image."""

    size: tuple[int, int]
    """height and width of a crop"""
    resize: int
    """length of the image's shorter side before"""

    def __call__(self, image: Tensor, epoch: int, i: int) -> Tensor:
        """Views uint8 [10, 3, h, w]."""
        image = resized(image, self.size, self.resize)
        return torch.stack([view for side in (image, image.flip(-1)) for view in self._five(side)])

    def _five(self, image: Tensor) -> list[Tensor]:
        high, wide = self.size
        top, bottom = image[:, :high], image[:, -high:]
        corners = [top[..., :wide], top[..., -wide:], bottom[..., :wide], bottom[..., -wide:]]
        return [*corners, centre_crop(image, self.size, None)]


@dataclass(frozen=True)
class CentreCrop:
    """The centre."""

    size: tuple[int, int]
    """height and width of the crop"""
    resize: int
    """length of the image's shorter side before"""

    def __call__(self, image: Tensor, epoch: int, i: int) -> Tensor:
        """One view, uint8 [1, 3, h, w]."""
        return centre_crop(image, self.size, self.resize)[None]


@dataclass(frozen=True)
class RandomSquare:
    """One random resized crop, half of them mirrored: a function of seed, epoch and dataset position."""

    size: tuple[int, int]
    """height and width of the crop"""
    scale: tuple[float, float]
    """smallest and largest area as a fraction of the image"""
    seed: int
    ratio: tuple[float, float] = (1.0, 1.0)
    """smallest and largest width / height of what is cut out"""

    def __call__(self, image: Tensor, epoch: int, i: int) -> Tensor:
        """One view, uint8 [1, 3, h, w]."""
        crop = MultiCrop((1,), (self.size,), self.scale[:1], self.scale[1:])
        u_1VS = crop.uniforms(self.seed, epoch, [i])
        box = random_boxes(u_1VS[..., :BOX_SLOTS], image.shape[1], image.shape[2], crop.scales, self.ratio)[0, 0]
        view = resized_crop(image, box, self.size)
        return (view.flip(-1) if crop.params(u_1VS)[0, 0, Param.FLIP] else view)[None]
