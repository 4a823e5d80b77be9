"""Several evaluations of several checkpoints side by side: one table in Markdown, CSV and JSON.

    python eval_all.py --pretrained a/checkpoint.pth.tar b.pth --data_path cifar10 --protocols knn linear clusters
    torchrun --nproc_per_node=8 eval_all.py --pretrained swav_800ep_pretrain.pth.tar --data_path /imagenet

Each protocol is that of its own script (eval_knn.py, ...) with that script's defaults. Features are computed once and
kept in the result folder. The same command resumes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.evals import inputs
from clusterssl.evals.cache import CacheOptions
from clusterssl.evals.protocols import Comparison, ProtocolOptions, names_of
from clusterssl.evals.setup import Setup, open_setup
from clusterssl.log import log_to_screen

logger = logging.getLogger("clusterssl.eval_all")


@dataclass(frozen=True)
class Networks(inputs.NetworkOptions):
    """Networks to evaluate."""

    pretrained: tuple[str, ...] = ()  # type: ignore[assignment]  # several here
    """checkpoints (files or URLs, own or published); without any the untrained network"""


@dataclass(frozen=True)
class Config:
    networks: Networks = Networks()
    data: inputs.DataOptions = inputs.DataOptions()
    protocol: ProtocolOptions = ProtocolOptions()
    cache: CacheOptions = CacheOptions()
    launch: inputs.LaunchOptions = inputs.LaunchOptions()
    dump_path: str = "."
    """folder of the table, and of one folder for each checkpoint"""
    seed: int = 31
    """of every evaluation"""


def first_setup(config: Config, names: Iterable[str]) -> Setup:
    """The images, and the first network that can be read; features are kept in the result folder."""
    networks, (first, *others) = config.networks, names
    flags = inputs.NetworkOptions(first, networks.arch, networks.stem, networks.image_size)
    cache = config.cache if config.cache.cache_features else CacheOptions(str(Path(config.dump_path) / "features"))
    return open_setup(config, flags, cache, or_else=others)


def main() -> None:
    config = cfg.parse(Config, description=__doc__)
    names, folder, comparison = names_of(config.networks.pretrained or ("",)), Path(config.dump_path), Comparison()
    setup = first_setup(config, names)
    title = f"Evaluations on {config.data.val_split} of {config.data.data_path}, percent"
    for pretrained, name in names.items():
        comparison.evaluate(name, pretrained, setup, config.protocol)
        log_to_screen(replace(setup.world, notes=()))  # training took the log into a file of its own
        paths = comparison.write(folder, title)
    logger.info("\n%s\n\nwritten: %s", comparison.table(title).text(), ", ".join(map(str, paths)))
    dist.leave()
    cfg.require(not comparison.failures, f"{len(comparison.failures)} failed: {'; '.join(comparison.failures)}")


if __name__ == "__main__":
    cfg.entry(main)
