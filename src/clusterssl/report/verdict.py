"""What a run's numbers mean, in words."""

from __future__ import annotations

import math
from statistics import median
from typing import NamedTuple

from clusterssl.report.records import RunRecord

NEAR_LN_K = 0.02
ABOVE_LN_K = 0.5
"""untrained networks begin up to a third above it"""
FEW_PROTOTYPES = 0.1
MANY_DEAD = 0.5
MOST = 0.5
"""of all images in one cluster; of two or three clusters, twice an equal share"""
LOW_RANK = 2.0
NARROWED = 0.25
"""of the untrained network's effective rank; good runs of six methods on digits and CIFAR-10 end at 0.44 to 1.4"""
FEW_DIRECTIONS = 0.1
"""directions for each prototype"""
LONG_WAIT = 0.2
EARLY = 0.1
"""of a run, in which nothing is said of a loss that has not fallen"""


class Remark(NamedTuple):
    """One finding; `kind` is good, note or bad."""

    kind: str
    text: str


def verdict(run: RunRecord, largest: float | None = None) -> list[Remark]:
    """Findings about the loss, the use of the prototypes, the features and the loader, the loss first.

    Args:
        run: as read from its directory.
        largest: share of the run's images that its final network puts into one cluster, where that was looked at.
    """
    if not run.steps:
        return [Remark("note", "No training step was logged yet.")]
    about_clusters = [_prototypes(run), _one_cluster(run, largest)]
    remarks = [_loss(run), *about_clusters, _features(run), _loader(run), _unfinished(run), _starts(run)]
    return [remark for remark in remarks if remark is not None]


def _tail(run: RunRecord, key: str) -> float | None:
    """Median of the end of a curve, so that one step decides nothing: the last tenth, of a short one the last fifth."""
    values = run.curve(key)[1]
    return median(values[-max(1, len(values) // 10, min(5, len(values) // 5)) :]) if values else None


def planned_steps(run: RunRecord) -> int:
    """Steps that the run shall have in all, 0 if unknown."""
    config, facts = run.about.get("config") or {}, run.about.get("facts") or {}
    per_epoch = facts.get("steps_per_epoch")
    return int(per_epoch * config["epochs"]) if per_epoch and "epochs" in config else 0


def _too_early(run: RunRecord) -> bool:
    """Whether a run has not left its warm-up or its first tenth, and is to go on."""
    total, step = planned_steps(run), int(run.steps[-1]["step"])
    if not total or step >= total:
        return False
    config = run.about["config"]
    return step < total * max(EARLY, config.get("warmup_epochs", 0) / config["epochs"])


def _loss(run: RunRecord) -> Remark | None:
    end, ln_k = _tail(run, "loss"), run.last("ln_k")
    if end is None:
        return Remark("bad", "No finite loss was logged.")
    begin = run.curve("loss")[1][0]
    if ln_k is None:
        return Remark("note", f"The loss went from {begin:.3f} to {end:.3f}.")
    compared = f"ln K = {ln_k:.3f}, the loss of a network that cannot tell images apart"
    if end > ln_k * (1 + ABOVE_LN_K):
        return Remark(
            "bad",
            f"The loss is {end:.3f} after {run.steps[-1]['step']} steps, above {compared}: it diverged. "
            "Try a lower --base_lr.",
        )
    if end > ln_k * (1 - NEAR_LN_K):
        text = f"The loss is {end:.3f} after {run.steps[-1]['step']} steps, "
        text += f"{'above' if end > ln_k * (1 + NEAR_LN_K) else 'still at'} {compared}"
        if _too_early(run):
            return Remark("note", f"{text}; this early it may be.")
        return Remark(
            "bad",
            f"{text}: it has not learned. Try {_sharper(run)}another --base_lr.",
        )
    return Remark("good", f"The loss fell to {end:.3f}, {1 - end / ln_k:.0%} below {compared}.")


def _sharper(run: RunRecord) -> str:
    """What helps assignments away from ln K, of the flags that the run's method has."""
    config = run.about.get("config") or {}
    freezes = config.get("freeze_prototypes_niters", math.inf) < planned_steps(run)
    return "a smaller --epsilon, " * ("epsilon" in config) + "a longer --freeze_prototypes_niters, " * freezes


def _prototypes(run: RunRecord) -> Remark | None:
    perplexity, dead, ln_k = _tail(run, "perplexity"), _tail(run, "dead_share"), run.last("ln_k")
    if perplexity is None or ln_k is None:
        return None
    number = round(math.exp(ln_k))
    text = f"{perplexity:.0f} of {number} prototypes are in effective use"
    text += f", {dead:.0%} were given no image." if dead is not None else "."
    few = perplexity < FEW_PROTOTYPES * number or (dead is not None and dead > MANY_DEAD)
    return Remark("bad" if few else "good", text)


def _one_cluster(run: RunRecord, largest: float | None) -> Remark | None:
    """Whether one cluster holds most images, of those that were looked at or of the crops of the last epoch."""
    counts = run.occupancy()
    counted = max(counts) / sum(counts) if any(counts) else 0.0
    most = max(MOST, 2 / len(counts)) if counts else MOST
    if max(largest or 0.0, counted) <= most:
        return None
    share, what = (largest, "images") if largest is not None and largest > most else (counted, "last epoch's crops")
    text = f"One cluster holds {share:.0%} of the {what}: the clusters hardly tell images apart"
    if _too_early(run):
        return Remark("note", f"{text}; this early it may be.")
    return Remark("bad", f"{text} after {run.steps[-1]['step']} steps. Try more --epochs, another --base_lr.")


def _features(run: RunRecord) -> Remark | None:
    rank = _tail(run, "rankme")
    if rank is None:
        return None
    if rank < LOW_RANK:
        return Remark(
            "bad", f"The features have an effective rank of {rank:.1f}: they have collapsed to a line or point."
        )
    if _narrowed(run, rank):
        text = f"The features narrowed from {run.curve('rankme')[1][0]:.0f} directions at the first step to {rank:.0f} "
        text += "(effective rank, RankMe): training threw away what told images apart."
        return Remark("bad", text + " Try a lower --base_lr." * _left_ln_k(run))
    return Remark("good", f"The features spread over {rank:.0f} directions (effective rank, RankMe).")


def _narrowed(run: RunRecord, rank: float) -> bool:
    """Whether learning has thrown directions away; few classes need few, so many prototypes must share them."""
    number = math.exp(run.last("ln_k") or 0.0)
    return rank < NARROWED * run.curve("rankme")[1][0] and rank < FEW_DIRECTIONS * number


def _left_ln_k(run: RunRecord) -> bool:
    """Whether the loss fell, so that its own remark names no remedy."""
    end, ln_k = _tail(run, "loss"), run.last("ln_k")
    return end is not None and ln_k is not None and end <= ln_k * (1 - NEAR_LN_K)


def _loader(run: RunRecord) -> Remark | None:
    waits, speeds = run.curve("data_wait")[1], run.curve("images_per_s")[1]
    if not waits or not speeds:
        return None
    wait, speed = median(waits), median(speeds)
    text = f"{speed:,.0f} images/s (median); {wait:.0%} of the time went into waiting for data"
    if wait > LONG_WAIT:
        return Remark("note", text + ": more loader processes (--workers) or smaller images on disk would help.")
    return Remark("good", text + ".")


def _unfinished(run: RunRecord) -> Remark | None:
    total, step = planned_steps(run), int(run.steps[-1]["step"])
    return Remark("note", f"The run is at step {step} of {total}.") if step < total else None


def _starts(run: RunRecord) -> Remark | None:
    if len(run.launches) < 2:
        return None
    return Remark("note", f"The run was started {len(run.launches)} times, each time going on from its checkpoint.")
