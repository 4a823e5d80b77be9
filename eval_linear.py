"""Linear evaluation of a frozen network: linear layers trained by SGD on its features, tested after every epoch.

Caron et al. 2020, https://arxiv.org/abs/2006.09882, section 4.1; the published setting is 8 ranks x 32 images. Other
published protocols by --preset; one classifier on each of several layers by --layers.

    python eval_linear.py --pretrained runs/mine/checkpoint.pth.tar --data_path /imagenet --dump_path runs/linear
    torchrun --nproc_per_node=8 eval_linear.py --pretrained swav_800ep_pretrain.pth.tar --data_path /imagenet
    python eval_linear.py --preset deepcluster --pretrained alexnet.pth.tar --data_path /imagenet --tencrops

The same command resumes. checkpoints/best.pth.tar in the run directory is the classifier of the best epoch.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.evals import inputs
from clusterssl.evals.cache import CacheOptions
from clusterssl.evals.probing import ClassifierOptions, linear, presets
from clusterssl.evals.setup import open_setup
from clusterssl.evals.training import SgdOptions
from clusterssl.mirrors import MirrorOptions

logger = logging.getLogger("clusterssl.eval_linear")


@dataclass(frozen=True)
class Config:
    network: inputs.NetworkOptions = inputs.NetworkOptions()
    data: inputs.DataOptions = inputs.DataOptions()
    classifier: ClassifierOptions = ClassifierOptions()
    optim: SgdOptions = SgdOptions()
    cache: CacheOptions = CacheOptions()
    mirrors: MirrorOptions = MirrorOptions()
    launch: inputs.LaunchOptions = inputs.LaunchOptions()
    dump_path: str = "."
    """run directory; the same command there resumes by itself"""
    seed: int = 31
    """of the classifier, the order, the crops and the choice of labels"""


def main() -> None:
    config = cfg.parse(Config, description=__doc__)
    setup = open_setup(config, config.network, config.cache, mirrors=config.mirrors)
    config = cfg.parse(Config, [*presets(config.classifier.preset, setup.network.arch), *sys.argv[1:]])
    for record in linear(setup, config.classifier, config.optim, cfg.plain(config)):
        name = f"{record['layer']}: " if "layer" in record else ""
        logger.info(
            "%slinear on %s: top-1 %.2f, top-5 %.2f", name, config.data.val_split, record["top1"], record["top5"]
        )
        setup.record("linear", record)
    dist.leave()


if __name__ == "__main__":
    cfg.entry(main)
