"""Draw the figures of docs/IDEA.md from the built-in digits, and keep the numbers that its text quotes.

    python docs/figures.py    # some seconds; writes docs/figures/*.svg and docs/figures/idea.json

Embeddings are centred pixels of unit length, so that everything shown is the assignments' doing, not a network's.

Shape suffixes: N images, K prototypes, D pixels.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.nn.functional as F
from drawing import BLUE, FOLDER, GREY, RUST, canvas, keep, strip
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from clusterssl.cluster.kmeans import KMeansOptions, spherical_kmeans
from clusterssl.cluster.queue import FeatureQueue
from clusterssl.cluster.sinkhorn import sinkhorn
from clusterssl.cluster.transport import TransportOptions, transport
from clusterssl.data.builtin import MemorySource, digits
from clusterssl.models.build import build_backbone
from clusterssl.monitor import entropy, perplexity

K = 10
EPSILONS = (1.0, 0.2, 0.05, 0.01)
TEMPERATURE = 0.1


def embedded(images_N3HW: Tensor, mean_D: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Centred pixels of unit length, float32 [N, D], and the centre."""
    x_ND = images_N3HW[:, 0].flatten(1).float()
    mean_D = x_ND.mean(0) if mean_D is None else mean_D
    return F.normalize(x_ND - mean_D, dim=1), mean_D


def counts(labels_N: Tensor, number: int = K) -> list[int]:
    """Images of each cluster."""
    return torch.bincount(labels_N, minlength=number).tolist()


@torch.no_grad()
def untrained(images_N3HW: Tensor) -> Tensor:
    """Scores [N, K] of random prototypes by a network that has seen nothing."""
    torch.manual_seed(0)
    backbone = build_backbone("conv4").eval()
    z_ND = F.normalize(backbone(images_N3HW.float() / 255), dim=1)
    return z_ND @ F.normalize(torch.randn(K, z_ND.shape[1]), dim=1).T


def chicken_and_egg(source: MemorySource, z_ND: Tensor) -> dict[str, Any]:
    """k-means of pixels: the clusters are about something already."""
    found = spherical_kmeans(z_ND, K, KMeansOptions(kmeans_init="kmeans++", kmeans_iters=20), seed=0)
    labels_N = torch.from_numpy(source.labels)
    figure, panels = canvas(2, rows=5, width=8.0, height=3.4)
    purest = []
    for cluster, axes in enumerate(panels):
        members = torch.where(found.labels_N == cluster)[0]
        near = members[(z_ND[members] @ found.centroids_KD[cluster]).argsort(descending=True)[:12]]
        share = torch.bincount(labels_N[members]).max().item() / len(members)
        purest.append(share)
        strip(axes, source.images[near], f"{len(members)} images, {share:.0%} of one class")
    keep(figure, "pixels")
    nmi = normalized_mutual_info_score(source.labels, found.labels_N.numpy())
    return {"nmi": round(100 * float(nmi), 1), "sizes": counts(found.labels_N), "purity": [round(x, 2) for x in purest]}


def equal_partition(scores_NK: Tensor) -> dict[str, Any]:
    """Sizes of clusters of an untrained network: nearest prototype, and optimal transport."""
    options = TransportOptions(equal_labels=True, sinkhorn_tol=1e-4)
    greedy = counts(scores_NK.argmax(1))
    equal = counts(transport(scores_NK, sharpness=1 / 0.05, options=options).labels_N)
    figure, panels = canvas(2, height=2.0)
    for axes, sizes, title in zip(panels, (greedy, equal), ("nearest prototype", "optimal transport"), strict=True):
        axes.bar(range(K), sizes, color=BLUE)
        axes.axhline(len(scores_NK) / K, color=GREY, linestyle=":")
        axes.set(title=title, xlabel="prototype", ylabel="images", xticks=range(K), ylim=(0, 1.1 * max(greedy)))
    keep(figure, "equal")
    effective = perplexity(torch.tensor(greedy))
    return {"nearest": greedy, "transport": equal, "effective": round(effective, 1)}


def smoothness(scores_NK: Tensor) -> dict[str, Any]:
    """The plan at several epsilons, for prototypes that are images drawn by chance."""
    figure, panels = canvas(len(EPSILONS), height=2.6)
    found = {}
    for axes, epsilon in zip(panels, EPSILONS, strict=True):
        plan_NK = sinkhorn(scores_NK.double(), epsilon, 100)
        axes.imshow(plan_NK[K : K + 24].numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="none")
        axes.set(title=f"epsilon {epsilon:g}", xlabel="prototype", xticks=[], yticks=[])
        found[f"{epsilon:g}"] = {
            "entropy": round(entropy(plan_NK), 2),
            "largest": round(plan_NK.amax(1).mean().item(), 2),
            "share_error": round((plan_NK.sum(0) * K / len(plan_NK) - 1).abs().max().item(), 4),
        }
    panels[0].set_ylabel("24 of the images")
    keep(figure, "epsilon")
    return {"ln_k": round(math.log(K), 2), **found}


def alternations(scores_NK: Tensor) -> dict[str, list[float]]:
    """How far the prototypes' shares are from equal after so many iterations."""
    figure, (axes,) = canvas(1, width=5.0, height=2.4)
    found = {}
    for epsilon, colour in zip(EPSILONS[1:], (GREY, BLUE, RUST), strict=True):
        plans = [sinkhorn(scores_NK.double(), epsilon, i) for i in range(1, 11)]
        errors = [(plan.sum(0) * K / len(plan) - 1).abs().max().item() for plan in plans]
        axes.plot(range(1, 11), errors, marker="o", markersize=3, color=colour, label=f"epsilon {epsilon:g}")
        found[f"{epsilon:g}"] = [round(error, 4) for error in errors]
    axes.axvline(3, color=GREY, linestyle=":")
    axes.set(xlabel="iterations", ylabel="largest error of a share", yscale="log")
    axes.legend(frameon=False)
    keep(figure, "iterations")
    return found


def swapped(source: MemorySource, z_ND: Tensor, mean_D: Tensor, centroids_KD: Tensor) -> dict[str, float]:
    """Two views of one digit, the assignment of one and the prediction from the other."""
    views = [source.images, source.images.roll((5, -4), (2, 3))]
    scores = [embedded(view, mean_D)[0] @ centroids_KD.T for view in views]
    q_NK = [sinkhorn(s_NK, 0.05, 3) for s_NK in scores]
    p_NK = [(s_NK / TEMPERATURE).softmax(1) for s_NK in scores]
    image = 4
    figure, panels = canvas(3, rows=2, width=8.0, height=3.0)
    for row, other in ((0, 1), (1, 0)):
        picture, assigned, predicted = panels[3 * row : 3 * row + 3]
        strip(picture, views[row][image : image + 1], f"view {row + 1}")
        assigned.bar(range(K), q_NK[row][image].tolist(), color=BLUE)
        assigned.set(title=f"q{row + 1}: assignment of view {row + 1}", ylim=(0, 1), xticks=[])
        predicted.bar(range(K), p_NK[other][image].tolist(), color=RUST)
        predicted.set(title=f"p{other + 1}: prediction from view {other + 1}", ylim=(0, 1), xticks=[])
    keep(figure, "swapped")
    losses = [-(q * p.log()).sum(1)[image].item() for q, p in zip(q_NK, reversed(p_NK), strict=True)]
    return {"loss": round(sum(losses) / 2, 3), "ln_k": round(math.log(K), 3)}


def queue(z_ND: Tensor, centroids_KD: Tensor, batch: int = 20) -> dict[str, float]:
    """Share of images of a small batch that get the prototype they get when all images are assigned together."""
    reference_N = sinkhorn(z_ND @ centroids_KD.T, 0.05, 3).argmax(1)
    found = {}
    for batches in (0, 1, 2, 5, 10, 20, 40):
        held = FeatureQueue(1, max(batches, 1) * batch, batch, z_ND.shape[1], torch.device("cpu"))
        same = seen = 0
        for z_BD, wanted_B in zip(z_ND.split(batch), reference_N.split(batch), strict=True):
            full = batches > 0 and held.is_full(0)
            rows_ND = torch.cat([held.rows(0), z_BD]) if full else z_BD
            if full or batches == 0:
                q_NK = sinkhorn(rows_ND @ centroids_KD.T, 0.05, 3)
                same += int((q_NK[-len(z_BD) :].argmax(1) == wanted_B).sum())
                seen += len(z_BD)
            held.push(0, z_BD)
        found[str(batches * batch)] = round(same / seen, 3)
    figure, (axes,) = canvas(1, width=5.0, height=2.2)
    axes.plot([int(length) for length in found], list(found.values()), marker="o", markersize=3, color=BLUE)
    axes.set(xlabel="images in the queue", ylabel="same prototype", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
    keep(figure, "queue")
    return found


def computed() -> dict[str, Any]:
    """Draw everything; the numbers behind it."""
    source = digits("train")
    z_ND, mean_D = embedded(source.images)
    by_chance_NK = z_ND @ z_ND[:K].T
    clusters = spherical_kmeans(z_ND, K, KMeansOptions(kmeans_init="kmeans++"), seed=0)
    many = spherical_kmeans(z_ND, 30, KMeansOptions(kmeans_init="kmeans++"), seed=0)
    return {
        "pixels": chicken_and_egg(source, z_ND),
        "equal": equal_partition(untrained(source.images)),
        "epsilon": smoothness(by_chance_NK),
        "iterations": alternations(by_chance_NK),
        "swapped": swapped(source, z_ND, mean_D, clusters.centroids_KD),
        "queue": queue(z_ND, many.centroids_KD),
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    found = computed()
    (FOLDER / "idea.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
