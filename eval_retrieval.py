"""Instance retrieval on Oxford5k, Paris6k and their revisited versions: find images of the same building.

Protocol of Caron et al. 2018 (https://arxiv.org/abs/1807.05520, section 4.4); easy, medium and hard are those of
Radenovic et al. 2018. PCA and whitening are learned on the other city, as published:

    python eval_retrieval.py --pretrained runs/mine/checkpoint.pth.tar --data_path rparis6k --whiten_on roxford5k
    python eval_retrieval.py --pretrained swav_800ep.pth.tar --data_path roxford5k --pooling gem --scales 1 0.7071 0.5

A folder holds gnd_<name>.pkl (read without executing anything) or .json, and the images in jpg/.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from clusterssl import config as cfg
from clusterssl import dist
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.evals import inputs
from clusterssl.evals.groundtruth import LEVELS
from clusterssl.evals.ranking import evaluate
from clusterssl.evals.retrieval import Benchmark, Describer, RetrievalOptions, image_files, ranked
from clusterssl.evals.vocdevkit import ImageFiles

logger = logging.getLogger("clusterssl.eval_retrieval")


@dataclass(frozen=True)
class Config:
    network: inputs.NetworkOptions = inputs.NetworkOptions()
    retrieval: RetrievalOptions = RetrievalOptions()
    launch: inputs.LaunchOptions = inputs.LaunchOptions()


def other_images(options: RetrievalOptions) -> ImageFiles | None:
    """The images that whitening is learned on."""
    if not options.whiten_on:
        return None
    folder = Path(options.whiten_on).expanduser()
    if not folder.is_dir():
        raise UserError(f"--whiten_on {folder}: no such folder")
    if folder.resolve() == Path(options.data_path).expanduser().resolve():
        raise UserError(f"--whiten_on {folder}: is what is evaluated; name another set of images")
    return ImageFiles(image_files(folder))


def scores(
    config: Config, world: World, network: inputs.Network, benchmark: Benchmark, other: ImageFiles | None
) -> Any:
    """Mean average precisions and mean precisions, in percent."""
    options = config.retrieval
    workers = inputs.DataOptions(data_path=options.data_path, workers=options.workers).usable_workers
    describer = Describer(network.backbone, options, world.device, network.std)
    whitening = None if other is None else describer.whitening(other, workers)
    boxes = [query.box if options.boxes else None for query in benchmark.truth.queries]
    database_NF = describer.describe(benchmark.database, (), whitening, workers)
    queries_QF = describer.describe(benchmark.queries, boxes, whitening, workers)
    return evaluate(ranked(queries_QF, database_NF).numpy(), benchmark.truth, options.ks)


def report(config: Config, network: inputs.Network, benchmark: Benchmark, found: dict[str, float]) -> None:
    """Show the table and append it to evaluations.jsonl."""
    options = config.retrieval
    logger.info("%s: %d queries, %d images", benchmark.name, len(benchmark.queries), len(benchmark.database))
    columns = ["map", *(f"mp{k}" for k in options.ks)]
    logger.info("%8s%s", "", "".join(f"{name:>8}" for name in columns))
    for level in LEVELS[benchmark.truth.protocol]:
        end = "" if level == "all" else f"_{level}"
        logger.info("%8s%s", level, "".join(f"{found[name + end]:8.2f}" for name in columns))
    how = {"pooling": options.pooling, "S": options.S, "scales": list(options.scales), "boxes": options.boxes,
           "whiten_on": options.whiten_on, "n_pca": options.n_pca if options.whiten_on else 0}  # fmt: skip
    data = inputs.DataOptions(data_path=options.data_path, val_split="queries")
    inputs.append_evaluation(options.dump_path, "retrieval", {**found, **how}, network, config.network, data)


def main() -> None:
    words = cfg.translate(sys.argv[1:], {"model": "pretrained", "dataset": "data_path"})
    config = cfg.parse(Config, words, description=__doc__)
    world = config.launch.join()
    benchmark, other = Benchmark(config.retrieval.data_path), other_images(config.retrieval)
    network = inputs.open_network(config.network, data_path=config.retrieval.data_path, seed=config.retrieval.seed)
    report(config, network, benchmark, scores(config, world, network, benchmark, other))
    dist.leave()


if __name__ == "__main__":
    cfg.entry(main)
