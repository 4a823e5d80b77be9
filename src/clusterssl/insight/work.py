"""What visualize.py does, in order: pictures of each kind as PNG, and one page that holds them all."""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clusterssl.config import require, require_numbers
from clusterssl.data import MEAN, Source, eval_batches, open_source, resize_for
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.evals import inputs
from clusterssl.files import atomic_write, first_line
from clusterssl.insight.answers import Best, attention, best_images, filter_pictures, prototype_neighbours
from clusterssl.insight.ascent import AscentOptions, ascend, picture
from clusterssl.insight.maps import first_convolution, usual_layers
from clusterssl.labelling.pages import square, thumbnails
from clusterssl.models.build import MultiCropNet
from clusterssl.models.network import Network
from clusterssl.models.selfclassifier import SelfClassifierNet
from clusterssl.models.vit import ViT
from clusterssl.models.weights import model_from_weights
from clusterssl.report import Gallery, strip
from clusterssl.report.page import write_page
from clusterssl.report.pictures import grid

logger = logging.getLogger(__name__)

_SHOWN = 96
_FIRST_NOTE = "The weights of the first layer as pictures, each stretched to the whole range of colours."
_ASCENT_NOTE = (
    "Each picture began as noise and was changed in {steps} small steps so that one filter of the layer answers to it "
    "more than the layer's others do: an exaggeration of what the filter looks for. Below it the filter's answer (mean "
    "over the picture after the ReLU) to the noise and to the picture; an answer that hardly grew means that the "
    "picture shows little, more steps (--niter) may help."
)
_IMAGES_NOTE = (
    "For each filter the images that it answers to most, the highest answer first, with the highest and the lowest "
    "answer that are shown (mean over the image after the ReLU)."
)
_CLUSTERS_NOTE = (
    "For each cluster the images of highest score, the highest first, with the highest and the lowest score that are "
    "shown: the cosine to the prototype, or the head's logit."
)
_LOOKS_NOTE = "Each image, and the same darkened where it does not speak for the cluster that the network chooses."
_PROTOTYPES_NOTE = (
    "Each prototype by its best image, then the prototypes most similar to it by theirs; cosines in brackets."
)


@dataclass(frozen=True)
class LookOptions:
    """What to look at."""

    out: str = ""
    """folder of the pictures and the page"""
    images: str = ""
    """images that filters and clusters are tried on; none: only what needs none is shown"""
    layers: tuple[str, ...] = ()
    """layers, conv1 ... or layer1 ..., or names of submodules; the last usual one of the network without this flag"""
    filters: int = 12
    """filters (or clusters) that are shown of each layer"""
    count: int = 9
    """images that are shown for each"""
    cls_num: int = 0
    """which of several heads"""
    batch_size: int = 64
    """images of a forward pass"""
    workers: int = 10
    """loader processes; at most the number of cores is used"""

    def __post_init__(self) -> None:
        require_numbers(self, "filters", "count", "batch_size", least=1)
        require_numbers(self, "cls_num", "workers", least=0)


class Look:
    """One network, looked into.

    Raises:
        UserError: see `inputs.open_network`; no such head, no such layer, no images.
    """

    def __init__(self, flags: inputs.NetworkOptions, options: LookOptions, world: World, seed: int) -> None:
        require(bool(options.out), "--out: name the folder of the pictures")
        self.options, self.device, self.seed = options, world.device, seed
        self.source = open_source(options.images) if options.images else None
        self.opened = inputs.open_network(flags, data_path=options.images, seed=seed)
        self.network = _whole(flags.pretrained, options.cls_num, self.opened.image_size)
        self.backbone = (self.opened.backbone if self.network is None else self.network.backbone).eval()
        (self.network or self.backbone).to(self.device)
        self.layers = options.layers or usual_layers(self.backbone, self.opened.image_size)[-1:]
        self.out = Path(options.out)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.out}: cannot be written ({first_line(error)}); choose another") from error

    def first_filters(self) -> Iterator[Gallery]:
        """The filters that see the image, where there are such."""
        try:
            weight = first_convolution(self.backbone).weight
        except UserError as error:
            logger.info("%s", error)
            return
        shown = filter_pictures(weight.detach().cpu().numpy()[:_SHOWN])
        sheet = grid([shown[at : at + 16] for at in range(0, len(shown), 16)], side=32, border=1, gap=4)
        self._png("first-filters", sheet)
        words = f"{len(shown)} of {len(weight)} first filters"
        yield Gallery("First filters", ((words, words, _address(sheet)),), _FIRST_NOTE, True)

    def ascents(self, options: AscentOptions) -> Iterator[Gallery]:
        """Images made for the first filters of each layer."""
        std = self.opened.std
        for layer in self.layers:
            made, answers = ascend(
                self.backbone, layer, range(self._filters(layer)), self.opened.image_size, options,
                normalize=lambda x: _normalized(x, std), seed=self.seed, device=self.device,
            )  # fmt: skip
            pictures = [picture(image) for image in made]
            self._png(f"ascent-{layer}", grid([pictures[at : at + 6] for at in range(0, len(pictures), 6)]))
            strips = tuple(
                (
                    f"filter {f}: answer {answers[0, f]:.3g} to noise, {answers[1, f]:.3g} to this",
                    f"Made for filter {f}",
                    _one(image),
                )
                for f, image in enumerate(pictures)
            )
            note = _ASCENT_NOTE.format(steps=options.niter)
            yield Gallery(f"What filters of {layer} are looking for", strips, note)

    def answers(self, source: Source) -> Iterator[Gallery]:
        """Images that filters and clusters answer to most."""
        found = best_images(
            self.network, self.backbone, self.layers, self._batches(source), self.options.count, self.options.cls_num
        )
        for name, best in found.items():
            number = min(self.options.filters, len(best.positions_CE))
            rows = [[square(source, int(i), 96) for i in best.positions_CE[c]] for c in range(number)]
            self._png(f"images-{name}", grid(rows, side=96))
            what = "cluster" if name == "clusters" else "filter"
            note = _CLUSTERS_NOTE if name == "clusters" else _IMAGES_NOTE
            yield Gallery(f"Images for {name}", tuple(_strips(best, source, number, what)), note, True)
            if name == "clusters":
                yield from self._prototypes(best, source, number)

    def _prototypes(self, best: Best, source: Source, number: int) -> Iterator[Gallery]:
        weight = _prototypes_of(self.network, self.options.cls_num)
        if weight is None or len(weight) < 2:
            return
        cosine, near = prototype_neighbours(weight, 4)
        strips = []
        for k in range(number):
            chosen = [int(best.positions_CE[j, 0]) for j in (k, *near[k])]
            told = ", ".join(f"{j} ({c:.2f})" for j, c in zip(near[k], cosine[k], strict=True))
            strips.append((f"prototype {k}, then {told}", f"Best image of prototypes {k}, {told}",
                           thumbnails(source, chosen)))  # fmt: skip
        yield Gallery("Prototypes and their nearest", tuple(strips), _PROTOTYPES_NOTE, True)

    def looks(self, source: Source) -> Iterator[Gallery]:
        """Where the network looks in some crops."""
        if self.network is None:
            return
        chosen = np.unique(np.linspace(0, len(source) - 1, self.options.filters).astype(int))
        layer = "" if isinstance(self.backbone, ViT) else self.layers[-1]
        pictures, strips = [], []
        for images, index in self._batches(source, chosen):
            seen = attention(self.network, images, layer, self.options.cls_num)
            shown = torch.nn.functional.interpolate(seen[:, None], images.shape[-2:], mode="bilinear")[:, 0]
            for image, map_HW, i in zip(_pixels(images, self.opened.std), shown.cpu().numpy(), index, strict=True):
                pair = [image, np.rint(image * (0.2 + 0.8 * map_HW[..., None])).astype(np.uint8)]
                pictures.append(pair)
                name = Path(source.name(int(i))).name
                strips.append((name, f"{name}, and where the network looks in it", strip(pair, side=128, photo=True)))
        self._png("attention", grid(pictures))
        yield Gallery("Where it looks", tuple(strips), _LOOKS_NOTE)

    def write(self, ascent: AscentOptions) -> None:
        """Everything."""
        galleries = [*self.first_filters(), *self.ascents(ascent)]
        if self.source is not None:
            galleries += [*self.answers(self.source), *self.looks(self.source)]
        lead = f"{self.opened.arch}, images of {self.opened.image_size[0]} x {self.opened.image_size[1]} pixels."
        write_page(self.out / "visualize.html", title="Looking into the network", lead=lead, galleries=galleries)
        logger.info("written: %s", self.out / "visualize.html")

    def _batches(self, source: Source, chosen: NDArray[np.int64] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.opened.image_size
        workers = inputs.DataOptions(data_path=self.options.images, workers=self.options.workers).usable_workers
        for batch in eval_batches(
            source, chosen, image_size=size, resize=resize_for(size), batch_size=self.options.batch_size,
            workers=workers, device=self.device, std=self.opened.std,
        ):  # fmt: skip
            yield batch.images, batch.index

    @torch.no_grad()
    def _filters(self, layer: str) -> int:
        blank = torch.zeros(1, 3, *self.opened.image_size, device=self.device)
        found = best_images(None, self.backbone, [layer], [(blank, torch.zeros(1, dtype=torch.int64))], 1)
        return min(self.options.filters, len(found[layer].positions_CE))

    def _png(self, name: str, sheet: bytes) -> None:
        atomic_write(self.out / f"{name}.png", lambda file: file.write(sheet))


def _whole(path: str, head: int, image_size: tuple[int, int]) -> Network | None:
    """The network with its heads, frozen; None where there are none."""
    try:
        network = model_from_weights(path).eval().requires_grad_(False) if path else None
        number = len(network.scores([torch.zeros(1, 3, *image_size)])) if network else 0
    except UserError as error:
        logger.info("%s", error)
        return None
    require(not number or head < number, f"--cls_num {head}: this network has heads 0 to {number - 1}; choose one")
    return network if number else None


def _prototypes_of(network: Network | None, head: int) -> Tensor | None:
    """Rows that a head compares embeddings with, K x D."""
    if isinstance(network, MultiCropNet):
        return network.prototype_layers()[head].weight
    if isinstance(network, SelfClassifierNet):
        return network.classifiers()[head].weight
    heads = getattr(network, "heads", None)
    return heads()[head].weight if heads is not None else None


def _normalized(x_B3HW: Tensor, std: Sequence[float]) -> Tensor:
    shape = (1, 3, 1, 1)
    return (x_B3HW - x_B3HW.new_tensor(MEAN).view(shape)) / x_B3HW.new_tensor(tuple(std)).view(shape)


def _pixels(images_B3HW: Tensor, std: Sequence[float]) -> NDArray[np.uint8]:
    """Normalised images as uint8 B x H x W x 3."""
    shape = (1, 3, 1, 1)
    x = images_B3HW.cpu() * torch.tensor(tuple(std)).view(shape) + torch.tensor(MEAN).view(shape)
    return (x * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _strips(best: Best, source: Source, number: int, what: str) -> Iterator[tuple[str, str, str]]:
    for c in range(number):
        caption = f"{what} {c}: {best.answers_CE[c, 0]:.3g} to {best.answers_CE[c, -1]:.3g}"
        yield caption, f"Images for {caption}", thumbnails(source, best.positions_CE[c].tolist())


def _one(image: NDArray[np.uint8]) -> str:
    return strip([image], side=128, photo=True)


def _address(sheet: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(sheet).decode("ascii")
