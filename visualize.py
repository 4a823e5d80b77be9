"""Look into a network: first filters, what filters look for, images they answer to, prototypes, attention.

Filters by gradient ascent as in Caron et al. 2018 (https://arxiv.org/abs/1807.05520, figure 4). PNG files and one page.

    python visualize.py --pretrained runs/mine --images photos --out pictures
    python visualize.py --pretrained deepcluster_alexnet.pth.tar --layers conv1 conv3 conv5 --out pictures
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.evals import inputs
from clusterssl.insight.ascent import AscentOptions
from clusterssl.insight.work import Look, LookOptions


@dataclass(frozen=True)
class Config:
    look: LookOptions = LookOptions()
    network: inputs.NetworkOptions = inputs.NetworkOptions()
    ascent: AscentOptions = AscentOptions()
    launch: inputs.LaunchOptions = inputs.LaunchOptions()
    seed: int = 31
    """of the noise that ascents begin with, and of the weights when there is no --pretrained"""


def main() -> None:
    config = cfg.parse(Config, description=__doc__)
    world = config.launch.join()
    inputs.require_alone(world, "visualize.py")
    Look(config.network, config.look, world, config.seed).write(config.ascent)
    dist.leave()


if __name__ == "__main__":
    cfg.entry(main)
