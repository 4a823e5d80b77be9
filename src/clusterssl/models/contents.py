"""What a checkpoint file is, in words: `python -m clusterssl.models.weights FILE ...`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clusterssl.errors import UserError
from clusterssl.models.foreign import no_network, system_of
from clusterssl.models.headed import head_sizes
from clusterssl.models.identify import Look, classifier_as_head, describe, head_part
from clusterssl.models.reading import WRAPPERS, State, listed, raw_state, read_file, unwrap

_USAGE = "usage: python -m clusterssl.models.weights FILE ...\n\nSays of every checkpoint (file or address) what it is."
_OWN = ("step", "model", "method_state")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def contents(path_or_url: str) -> dict[str, str]:
    """What a checkpoint holds, as words under headings, in the order in which they are shown.

    Raises:
        UserError: see `read_weights`.
    """
    return read_file(path_or_url, _told)


def _told(checkpoint: Mapping[str, Any], where: str) -> dict[str, str]:
    state, meta = unwrap(checkpoint, where)
    state = classifier_as_head(state)
    look = describe(state, meta)
    what = system_of(raw_state(checkpoint, where)) or _system(state, checkpoint, look)
    told = {"what": what + (", written by this suite" if set(_OWN) <= set(checkpoint) else "")}
    if look is None:
        told["network"] = no_network(state) or f"not known; its first names: {listed(state)}"
    else:
        numbers = sum(t.numel() for n, t in state.items() if not head_part(n) and not n.endswith(_STATISTICS))
        told["network"] = f"{look.arch}, {look.stem} stem, {numbers:,} numbers"
        told |= _heads(state)
    sizes = meta.get("size_crops") or []
    if sizes:
        told["trained on"] = "crops of " + ", ".join("x".join(map(str, size)) for size in sizes) + " pixels"
    others = {key: value for key, value in checkpoint.items() if key not in WRAPPERS and not isinstance(value, Tensor)}
    words = [f"{key} {value}" if isinstance(value, (int, str)) else str(key) for key, value in others.items()]
    told["beside it"] = ", ".join(words) or "nothing"
    return told


def _system(state: State, checkpoint: Mapping[str, Any], look: Look | None) -> str:
    """The method or kind of file, from its names."""
    parts = {head_part(name) for name in state} - {""}
    if look is None:
        return "a linear classifier" if "linear.weight" in state and no_network(state) else "weights of another network"
    if parts & {"mlp_head", "cls_0"}:
        return "Self-Classifier"
    if "prototypes" in parts:
        several = any(name.startswith("prototypes.prototypes1.") for name in state)
        return "SwAV's family, several sets of prototypes (DeepCluster-v2, SeLa-v2)" if several else "SwAV's family"
    if "projection_head" in parts:
        return "SwAV's family, fine-tuned" if "projection_head.weight" in state else "SwAV's family, no prototypes"
    if any(part.startswith("top_layer") for part in parts):
        if look.arch.startswith(("sobel:deepcluster", "deepcluster")):
            return "DeepCluster"
        if "labels" in checkpoint or "L" in checkpoint or look.arch.startswith("sela_"):
            return "SeLa"
        torchvisions = any(name.removeprefix("module.").startswith("fc.") for name in raw_state(checkpoint, ""))
        return "a network with a classifier (torchvision's names)" if torchvisions else "DeepCluster or SeLa"
    return "a backbone without head"


def _heads(state: State) -> dict[str, str]:
    """Projection and clusters."""
    told = {}
    dims = [len(t) for n, t in state.items() if head_part(n) in ("projection_head", "mlp_head") and t.ndim == 2]
    if dims:
        told["projection"] = " to ".join(map(str, dims)) + " numbers"
    clusters = [len(t) for n, t in state.items() if n.startswith("prototypes.") and t.ndim == 2]
    clusters += [len(t) for n, t in state.items() if n.startswith("cls_") and n.endswith("weight_v")]
    clusters += list(head_sizes(state))
    if clusters:
        told["clusters"] = ", ".join(map(str, clusters))
    return told


def main() -> None:
    """Tell what the files on the command line are; ends the process with 2 where one of them cannot be read."""
    paths, code = sys.argv[1:], 0
    if not paths or paths[0] in ("-h", "--help"):
        sys.stdout.write(_USAGE + "\n")
        sys.exit(0 if paths else 2)
    for path in paths:
        try:
            told = contents(path)
        except UserError as error:
            sys.stderr.write(f"{error}\n")
            code = 2
            continue
        sys.stdout.write(f"{path}\n" + "".join(f"  {name:12}{words}\n" for name, words in told.items()))
    sys.exit(code)
