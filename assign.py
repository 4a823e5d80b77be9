"""Label any folder of images by a trained network: CSV, a page to look at, links, duplicates, outliers, neighbours.

A network with clusters of its own (prototypes, heads, classifiers) is taken at its word; --k divides the images into
any other number of clusters by k-means of the features, which any network has. Killed, the same command goes on.

    python assign.py --pretrained runs/mine --images photos --out labels
    python assign.py --pretrained runs/mine --images photos --out labels --k 20 --links
    python assign.py --pretrained moco_v2_800ep.pth.tar --images photos --out labels --near cat.jpg dog.jpg
    python assign.py --pretrained runs/sela --labels --out pseudo.csv    # what the run's own images were labelled
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.evals import inputs
from clusterssl.labelling.work import Options, label_folder


@dataclass(frozen=True)
class Config(Options):
    launch: inputs.LaunchOptions = inputs.LaunchOptions()


def main() -> None:
    config = cfg.parse(Config, description=__doc__)
    label_folder(config, config.launch.join())
    dist.leave()


if __name__ == "__main__":
    cfg.entry(main)
