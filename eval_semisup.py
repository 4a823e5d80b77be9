"""Semi-supervised evaluation: the whole network is fine-tuned with 1 % or 10 % of the labels.

Caron et al. 2020, https://arxiv.org/abs/2006.09882, section 4.2; the published setting is 8 ranks x 32 images.

    torchrun --nproc_per_node=8 eval_semisup.py --pretrained swav_800ep_pretrain.pth.tar --data_path /imagenet \
        --labels_perc 10 --lr 0.01 --lr_last_layer 0.2 --label_list published --dump_path runs/semisup10
    torchrun --nproc_per_node=8 eval_semisup.py --pretrained swav_800ep_pretrain.pth.tar --data_path /imagenet \
        --labels_perc 1 --lr 0.02 --lr_last_layer 5 --label_list published --dump_path runs/semisup1

The same command resumes. checkpoints/best.pth.tar in the run directory is the network of the best epoch.
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
from clusterssl.evals.finetuning import FinetuneOptions, finetune
from clusterssl.evals.setup import open_setup
from clusterssl.mirrors import MirrorOptions

logger = logging.getLogger("clusterssl.eval_semisup")


@dataclass(frozen=True)
class Config:
    network: inputs.NetworkOptions = inputs.NetworkOptions()
    data: inputs.DataOptions = inputs.DataOptions()
    finetune: FinetuneOptions = FinetuneOptions()
    mirrors: MirrorOptions = MirrorOptions()
    launch: inputs.LaunchOptions = inputs.LaunchOptions()
    dump_path: str = "."
    """run directory; the same command there resumes by itself"""
    seed: int = 31
    """of the classifier, the order, the crops and the draw of labels"""


def main() -> None:
    config = cfg.parse(Config, description=__doc__)
    setup = open_setup(config, config.network, mirrors=config.mirrors)
    for record in finetune(setup, config.finetune, cfg.plain(config)):
        logger.info(
            "%g %% of the labels, %s: top-1 %.2f, top-5 %.2f (epoch %d)",
            config.finetune.labels_perc, config.data.val_split, record["top1"], record["top5"], record["epoch"],
        )  # fmt: skip
        setup.record("semisup", record)
    dist.leave()


if __name__ == "__main__":
    cfg.entry(main)
