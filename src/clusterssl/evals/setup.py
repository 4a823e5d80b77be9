"""What every protocol on labelled images works on: ranks, a frozen network, images to learn from and to test on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from clusterssl.data import Source
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.evals import inputs
from clusterssl.evals.cache import CacheOptions, Extraction
from clusterssl.mirrors import MirrorOptions
from clusterssl.models.headed import HeadedNet
from clusterssl.models.network import Network as WholeNetwork
from clusterssl.models.weights import model_from_weights


class Embedding(nn.Module):
    """What a network's head makes of an image, as features: the space in which its method compares images.

    Args:
        network: a whole network, e.g. of `model_from_weights`.

    Raises:
        UserError: it has no head, or one that gives classes only.
    """

    def __init__(self, network: WholeNetwork) -> None:
        super().__init__()
        if isinstance(network, HeadedNet) or not _has_head(network):
            raise UserError("--use_mlp: this network has no projection head; leave the flag out")
        self.network = network

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Embeddings B x D."""
        return self.network([images_B3HW])[0]


class Clusters(nn.Module):
    """Cluster ids of a network's own head, as features of one column.

    Args:
        network: a whole network, e.g. of `model_from_weights`.
        head: which of several heads.
    """

    def __init__(self, network: WholeNetwork, head: int = 0) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Ids B x 1."""
        return self.network.predict(images_B3HW, self.head)[:, None]


def _has_head(network: WholeNetwork) -> bool:
    heads = (getattr(network, name, None) for name in ("projection_head", "mlp_head"))
    return any(head is not None and next(head.parameters(), None) is not None for head in heads)


@dataclass(frozen=True)
class Setup:
    """One network on one dataset."""

    world: World
    network: inputs.Network
    train: Source
    val: Source
    flags: inputs.NetworkOptions
    data: inputs.DataOptions
    cache: CacheOptions
    dump_path: str
    seed: int
    mirrors: tuple[str, ...] = ()
    """of the records of a training"""

    def extraction(
        self, network: nn.Module | None = None, part: str = "backbone", batch_size: int = 256, *,
        ten_crops: bool = False,
    ) -> Extraction:  # fmt: skip
        """How features are made: of the backbone, or of another network with a word for it."""
        return Extraction(
            self.network.backbone if network is None else network, self.network.image_size, part,
            batch_size=batch_size, workers=self.data.usable_workers, device=self.world.device,
            folder=self.cache.cache_features, std=self.network.std, ten_crops=ten_crops,
            spill=str(Path(self.dump_path) / "features"),
        )  # fmt: skip

    def whole_network(self) -> WholeNetwork:
        """The checkpoint's network with its heads.

        Raises:
            UserError: there is no checkpoint, or it does not tell its architecture.
        """
        if not self.flags.pretrained:
            raise UserError("--pretrained: name the checkpoint; a network without one has no trained head")
        network = model_from_weights(self.flags.pretrained)
        return network.requires_grad_(False).to(self.world.device).eval()

    def record(self, kind: str, numbers: dict[str, Any]) -> None:
        """Append a result to evaluations.jsonl."""
        inputs.append_evaluation(self.dump_path, kind, numbers, self.network, self.flags, self.data)

    def of(self, pretrained: str, dump_path: str) -> Setup:
        """The same for another checkpoint, with a folder of its own."""
        return replace(self, flags=replace(self.flags, pretrained=pretrained), dump_path=dump_path).reopened()

    def reopened(self) -> Setup:
        """The same with a network of its own: protocols may train it or listen in to its layers."""
        network = inputs.open_network(self.flags, data_path=self.data.data_path, seed=self.seed)
        return replace(self, network=network)


class Config(Protocol):
    """Flags of every script that works on a setup."""

    @property
    def data(self) -> inputs.DataOptions: ...
    @property
    def launch(self) -> inputs.LaunchOptions: ...
    @property
    def dump_path(self) -> str: ...
    @property
    def seed(self) -> int: ...


def open_setup(
    config: Config, network: inputs.NetworkOptions, cache: CacheOptions | None = None, *,
    mirrors: MirrorOptions | None = None, or_else: Sequence[str] = (),
) -> Setup:  # fmt: skip
    """Join the other ranks, open the images and the network.

    Args:
        config: how the ranks meet, the images, where results go, the seed of everything random.
        network: its checkpoint and what it does not tell.
        cache: where features are kept.
        mirrors: where the records of a training are copied to.
        or_else: checkpoints to open instead, the first that can be read.

    Raises:
        UserError: see `inputs.open_splits` and `inputs.open_network`; or `dump_path` cannot be written.
    """
    world = config.launch.join()
    train, val = inputs.open_splits(config.data)
    problems = []
    for flags in (network, *(replace(network, pretrained=other) for other in or_else)):
        try:
            opened = inputs.open_network(flags, data_path=config.data.data_path, seed=config.seed)
        except UserError as error:
            problems.append(error)
            continue
        inputs.check_writable(config.dump_path)
        return Setup(
            world, opened, train, val, flags, config.data, cache or CacheOptions(), config.dump_path, config.seed,
            mirrors.mirrors if mirrors else (),
        )  # fmt: skip
    raise UserError("; ".join(dict.fromkeys(map(str, problems))))
