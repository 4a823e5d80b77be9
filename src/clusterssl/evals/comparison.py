"""A pretrained network beside the pixels it saw and beside itself before training, over several seeds.

Legend of suffixes: N images, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from clusterssl.data import Source, eval_batches
from clusterssl.evals.baselines import Pixels, label_scores, unlabelled_scores
from clusterssl.evals.features import calibrate_batchnorm, extract
from clusterssl.evals.setup import Embedding
from clusterssl.models.build import build_model, resolve_stem
from clusterssl.models.weights import model_from_weights

Scores = dict[str, float]
BATCH = 250


class Comparison:
    """Scores representations on the same images with the same draws of labels.

    Args:
        train: images whose labels the probes may use.
        test: images that are scored.
        image_size: height and width in pixels.
        seed: of the label draws and of k-means.
    """

    def __init__(self, train: Source, test: Source, image_size: tuple[int, int], seed: int) -> None:
        self.train, self.test, self.size, self.seed = train, test, image_size, seed

    def _features(self, network: nn.Module, source: Source) -> tuple[Tensor, Tensor]:
        return extract(network, source, image_size=self.size, batch_size=BATCH)

    def _scores(self, network: nn.Module, clustered: nn.Module) -> Scores:
        train, test = self._features(network, self.train), self._features(network, self.test)
        embedded = test if clustered is network else self._features(clustered, self.test)
        return label_scores(*train, *test, seed=self.seed) | unlabelled_scores(*embedded, seed=self.seed)

    def pixels(self) -> Scores:
        """Scores of raw pixels."""
        pixels = Pixels()
        return self._scores(pixels, pixels)

    def pretrained(self, checkpoint: str) -> Scores:
        """Scores of a checkpoint: labels on the backbone's features, clusters in the embedding."""
        model = model_from_weights(checkpoint)
        return self._scores(model.backbone, Embedding(model))

    def untrained(self, config: Mapping[str, Any]) -> dict[str, Scores]:
        """Scores of the network that a run's configuration describes, as it was before training, in four readings.

        Labels are always used on the backbone's features, which serve them better than an untrained head's output.
        """
        torch.manual_seed(config["seed"])
        stem = resolve_stem(config["stem"], max(self.size))
        network = ("hidden_mlp", "feat_dim", "nmb_prototypes")
        model = build_model(config["arch"], stem, *(config[key] for key in network))
        embedding, found = Embedding(model), {}
        for state in ("as initialised", "with BatchNorm set on the data"):
            if state != "as initialised":
                batches = eval_batches(self.train, image_size=self.size, batch_size=BATCH)
                calibrate_batchnorm(embedding, (batch.images for batch in batches))
            scores = self._scores(model.backbone, model.backbone)
            clusters = unlabelled_scores(*self._features(embedding, self.test), seed=self.seed)
            found[state] = scores
            found[f"{state}, clusters of the embedding"] = scores | clusters
        return found

    def everything(self, checkpoint: str, config: Mapping[str, Any]) -> dict[str, Scores]:
        """Scores of "pixels", of the untrained network in four readings, and of "pretrained"."""
        return {"pixels": self.pixels(), **self.untrained(config), "pretrained": self.pretrained(checkpoint)}


def summary(found: Sequence[Mapping[str, Scores]]) -> dict[str, dict[str, list[float]]]:
    """From `Comparison.everything` of several seeds to rows: per row and measure the values, one per seed.

    "untrained" is, for each measure, the reading that is best on average, so that the gain is not flattered.
    """
    readings = [name for name in found[0] if name not in ("pixels", "pretrained")]
    return {
        "raw pixels": strongest([{"": seed["pixels"]} for seed in found]),
        "untrained": strongest([{name: seed[name] for name in readings} for seed in found]),
        "pretrained": strongest([{"": seed["pretrained"]} for seed in found]),
    }


def strongest(readings: Sequence[Mapping[str, Scores]]) -> dict[str, list[float]]:
    """For each measure the values, one per seed, of the reading whose mean is the highest."""
    measures = next(iter(readings[0].values()))
    columns: dict[str, list[float]] = {}
    for measure in measures:
        candidates = [[seed[reading][measure] for seed in readings] for reading in readings[0]]
        columns[measure] = max(candidates, key=mean)
    return columns


def with_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, in points."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def difference(points: float) -> str:
    """A difference of percentages in words."""
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"
