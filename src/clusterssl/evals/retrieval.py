"""Instance retrieval with a frozen network: descriptors of whole images at several scales, ranked by their products.

Protocol of Caron et al. 2018, section 4.4, after Tolias et al. 2016; revisited benchmarks: Radenovic et al. 2018.

Suffixes: Q queries, N database images, R vectors of an image, F features, h w map height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clusterssl import dist
from clusterssl.config import require_numbers
from clusterssl.data.listing import EXTENSIONS
from clusterssl.data.views import view_batches
from clusterssl.errors import UserError
from clusterssl.evals.groundtruth import BROKEN, GroundTruth, read_ground_truth, read_original
from clusterssl.evals.pace import paced
from clusterssl.evals.pooling import Moments, Pooling, described, pooled
from clusterssl.evals.vocdevkit import ImageFiles
from clusterssl.models.trunks import ConvTrunk

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class RetrievalOptions:
    """Descriptors."""

    data_path: str = ""
    """folder with gnd_<name>.pkl (or .json) and jpg/; or with Oxford's or Paris's text files in gt/ and the images"""
    pooling: Pooling = "rmac"
    """of feature maps into vectors: rmac (largest value over regions), gem (generalised mean) or avg (mean)"""
    S: int = 1024
    """length in pixels of an image's longer side"""
    L: int = 3
    """levels of the regions of rmac"""
    gem_p: float = 3.0
    """power of gem"""
    scales: tuple[float, ...] = (1.0,)
    """factors on S whose vectors are put together, e.g. 1 0.7071 0.5"""
    whiten_on: str = ""
    """other folder (a benchmark's or any images) that PCA and whitening are learned on; empty: neither"""
    n_pca: int = 512
    """dimensions after PCA"""
    boxes: bool = True
    """cut queries to their boxes"""
    ks: tuple[int, ...] = (1, 5, 10)
    """numbers of first images for mean precisions"""
    workers: int = 10
    """loader processes per rank; at most the number of cores is used, 0 loads in this process"""
    dump_path: str = "."
    """folder where the result is appended to evaluations.jsonl"""
    seed: int = 31
    """of the random weights, when there is no --pretrained"""

    def __post_init__(self) -> None:
        require_numbers(self, "S", "L", "n_pca", least=1)
        require_numbers(self, "gem_p", "scales", "ks", above=0)


class Benchmark:
    """Images and ground truth of one folder."""

    def __init__(self, folder: str) -> None:
        """Find the ground truth and the images it names.

        Raises:
            UserError: no ground truth or several, or images that are missing; says what was found and what is expected.
        """
        path = _folder(folder)
        files = image_files(path)
        names = {file.stem: file for file in sorted(files, key=lambda file: file.parent == path / "jpg")}  # jpg/ wins
        self.truth = _ground_truth(path, sorted(names))
        self.name = path.name
        wanted = [*self.truth.names, *(query.name for query in self.truth.queries)]
        absent = [name for name in wanted if name not in names]
        if absent:
            raise UserError(
                f"{path}: {len(absent)} of {len(wanted)} images of the ground truth are missing, {absent[0]} first; "
                f"found {len(files)} images below it, expected them in jpg/"
            )
        self.database = ImageFiles([names[name] for name in self.truth.names])
        self.queries = ImageFiles([names[query.name] for query in self.truth.queries])


def _folder(folder: str) -> Path:
    if not folder:
        raise UserError("--data_path: name the folder that holds gnd_<name>.pkl and jpg/")
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    return path


def image_files(path: Path) -> list[Path]:
    """All images below a folder, by path, without the damaged ones of Paris."""
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and file.stem not in BROKEN)
    if not files:
        raise UserError(f"{path}: no images below it; expected them in jpg/")
    return files


def _ground_truth(path: Path, names: Sequence[str]) -> GroundTruth:
    files = sorted(path.glob("gnd_*.pkl")) or sorted(path.glob("gnd_*.json"))
    if len(files) == 1:
        return read_ground_truth(files[0])
    texts = [folder for folder in (path / "gt", path) if any(folder.glob("*_query.txt"))]
    if texts and not files:
        return read_original(texts[0], names)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8])
    raise UserError(f"{path}: holds {found}; expected one gnd_<name>.pkl (or .json), or gt/ with *_query.txt")


@dataclass(frozen=True)
class Whole:
    """A whole image of which the longer side has a given length, or the part of it in a box."""

    longer: int
    """length of the longer side in pixels"""
    boxes: tuple[Box | None, ...] = ()
    """left, top, right, bottom of each image in its original pixels"""

    def __call__(self, image: Tensor, epoch: int, i: int) -> Tensor:
        """One view, uint8 [1, 3, h, w]."""
        factor = self.longer / max(image.shape[1:])
        high, wide = (max(1, round(factor * side)) for side in image.shape[1:])
        planar = image[None].contiguous(memory_format=torch.channels_last)
        resized = F.interpolate(planar, size=(high, wide), mode="bilinear", antialias=True)
        if not self.boxes or (box := self.boxes[i]) is None:
            return resized
        left, top, right, bottom = (round(factor * edge) for edge in box)
        left, top = min(max(left, 0), wide - 1), min(max(top, 0), high - 1)
        return resized[:, :, top : max(bottom, top + 1), left : max(right, left + 1)]


class Describer:
    """A frozen network that turns images into descriptors.

    Args:
        backbone: with a feature map before pooling.
        options: flags.
        device: where to compute.
        std: of the pixels.

    Raises:
        UserError: the network gives no feature map.
    """

    def __init__(
        self, backbone: nn.Module, options: RetrievalOptions, device: torch.device, std: Sequence[float]
    ) -> None:
        if not hasattr(backbone, "forward_map"):
            raise UserError("this architecture gives no feature map to pool; use a resnet, alexnet or vgg16 of ours")
        self.backbone, self.options, self.device, self.std = backbone.to(device).eval(), options, device, std
        self.features = len(self._map(torch.zeros(1, 3, 64, 64, device=device))[0])

    @torch.no_grad()
    def _map(self, image_13HW: Tensor) -> Tensor:
        """Feature map 1 x F x h x w; AlexNet's and VGG's without their last max-pooling, as published."""
        net = self.backbone
        if not isinstance(net, ConvTrunk):
            return net.forward_map(image_13HW)  # type: ignore[operator]
        return net.features[:-1](image_13HW if net.sobel is None else net.sobel(image_13HW))

    def vectors(self, image_13HW: Tensor) -> Tensor:
        """Vectors R x F of unit length of one image at all scales; those of gem and avg are averaged over the scales.

        Raises:
            UserError: the image is too small for the network.
        """
        found = []
        for scale in self.options.scales:
            size = [max(1, round(scale * side)) for side in image_13HW.shape[-2:]]
            image = image_13HW if scale == 1 else F.interpolate(image_13HW, size=size, mode="bilinear", antialias=True)
            try:
                map_Fhw = self._map(image)[0]
            except RuntimeError as error:
                raise UserError(f"an image of {size[0]}x{size[1]} is too small for this network; raise --S") from error
            found.append(pooled(map_Fhw, self.options.pooling, levels=self.options.L, p=self.options.gem_p))
        vectors_RF = torch.cat(found)
        return vectors_RF if self.options.pooling == "rmac" else F.normalize(vectors_RF.sum(0, keepdim=True), dim=1)

    def each(self, images: ImageFiles, boxes: Sequence[Box | None], workers: int) -> Iterator[tuple[int, Tensor]]:
        """Position and vectors of every image of this rank's share."""
        first, last = dist.share(len(images))
        keys = [[(0, i)] for i in range(first, last)]
        cut = Whole(self.options.S, tuple(boxes))
        batches = view_batches(images, keys, cut, workers=workers, device=self.device, std=self.std)
        for views, index in paced(batches, len(keys), "descriptors"):
            yield int(index), self.vectors(views[0])

    def whitening(self, images: ImageFiles, workers: int) -> tuple[Tensor, Tensor]:
        """Mean and projection learned on the vectors of other images; a collective."""
        moments = Moments(self.features, self.device)
        for _, vectors_RF in self.each(images, (), workers):
            moments.add(vectors_RF)
        return moments.whitening(self.options.n_pca)

    def describe(
        self, images: ImageFiles, boxes: Sequence[Box | None], whitening: tuple[Tensor, Tensor] | None, workers: int
    ) -> Tensor:
        """Descriptors of unit length of all images on every rank, float64 on the CPU, row i of image i."""
        width = self.features if whitening is None else whitening[1].shape[1]
        rows = torch.zeros(len(images), width, dtype=torch.float64)
        for i, vectors_RF in self.each(images, boxes, workers):
            rows[i] = described(vectors_RF, whitening).cpu()
        return dist.all_reduce_(rows)


def ranked(queries_QF: Tensor, database_NF: Tensor) -> Tensor:
    """Database positions by falling product with each query, Q x N; equal ones in their order."""
    return torch.argsort(queries_QF @ database_NF.T, dim=1, descending=True, stable=True)
