"""Names of other projects' files, read as ours: MoCo, SimSiam, SCAN; what else a file may be that holds no network."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

_ENCODERS = {"encoder_q.": "MoCo", "encoder.": "SimSiam"}
_CLASSIFIER = {"linear.weight", "linear.bias"}


def system_of(names: Iterable[str]) -> str:
    """ "MoCo", "SimSiam" or "SCAN" whose file has these names; "" when it is none of theirs."""
    bare = {name.removeprefix("module.") for name in names}
    found = next((system for prefix, system in _ENCODERS.items() if f"{prefix}conv1.weight" in bare), "")
    return "SCAN" if not found and any(name.startswith("cluster_head.") for name in bare) else found


def adapted(state: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The state dict with our names: of MoCo and SimSiam the backbone, of SCAN the cluster heads too; others unchanged.

    What is left aside (projections, predictors, momentum encoders, queues) is told in the log.

    Args:
        state: names and tensors as the file has them.
        where: how the log calls the file.
    """
    system = system_of(state)
    if not system:
        return dict(state)
    bare = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    kept = _scan(bare) if system == "SCAN" else _encoder(bare, system)
    logger.info("%s: a file of %s; %d of its %d tensors are not part of what is read (projections, predictors, queues)",
                where, system, len(bare) - len(kept), len(bare))  # fmt: skip
    return kept


def _encoder(bare: Mapping[str, Any], system: str) -> dict[str, Any]:
    prefix = next(prefix for prefix, name in _ENCODERS.items() if name == system)
    names = {name: name.removeprefix(prefix) for name in bare if name.startswith(prefix)}
    return {own: bare[name] for name, own in names.items() if not own.startswith("fc.")}


def _scan(bare: Mapping[str, Any]) -> dict[str, Any]:
    heads = sorted({match[1] for name in bare if (match := re.match(r"cluster_head\.(\d+)\.", name))}, key=int)
    kept = {name: tensor for name, tensor in bare.items() if name.startswith("backbone.")}
    for i, head in enumerate(heads):
        for part in ("weight", "bias"):
            own = f"top_layer{i if len(heads) > 1 else ''}.{part}"
            if f"cluster_head.{head}.{part}" in bare:
                kept[own] = bare[f"cluster_head.{head}.{part}"]
    return kept


def no_network(state: Mapping[str, Any]) -> str:
    """What a flat state dict without a backbone is, and what to do, for errors; "" when that is not known."""
    if set(state) >= _CLASSIFIER and not any(name.startswith(("conv1.", "features.")) for name in state):
        classes, inputs = state["linear.weight"].shape
        return (
            f"it is the linear classifier of an evaluation ({inputs} features to {classes} classes), without the "
            "network; give the checkpoint that was evaluated"
        )
    if "stem.conv1.weight" in state and any(name.startswith("res2.") for name in state):
        return "it has detectron2's names; give the checkpoint that it was exported from"
    return ""
