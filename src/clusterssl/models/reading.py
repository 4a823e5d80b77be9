"""What is in a checkpoint file or behind an address: parameters under flat names, and what comes with them.

Flat names have no prefix "module." and no "backbone.": "conv1.weight", "projection_head.0.weight", "prototypes.weight",
"top_layer.weight", "cls_0.weight_g".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from clusterssl.errors import UserError
from clusterssl.files import read_checkpoint
from clusterssl.models.download import fetch, is_url
from clusterssl.models.foreign import adapted

State = dict[str, Tensor]
WRAPPERS = ("state_dict", "model", "network")  # the last is OBoW's
_LISTED = 8


def read_weights(path_or_url: str) -> tuple[State, dict[str, Any]]:
    """Parameters of a checkpoint file or address, and what an own checkpoint says of its network.

    Understands a flat state dict and one wrapped in "state_dict" (or "model", "network"), with and without "module.",
    and the names of MoCo, SimSiam and SCAN (see `foreign`).

    Returns:
        Flat state dict, and the checkpoint's "model" entry ({} in files of others):
        arch, stem, size_crops, ...

    Raises:
        UserError: missing, unreadable, truncated, unsafe file, failed download, or a file without weights.
    """
    state, meta = read_file(path_or_url, unwrap)
    if not all(bool(tensor.isfinite().all()) for tensor in state.values() if tensor.is_floating_point()):
        raise UserError(
            f"{path_or_url}: holds weights that are not finite (NaN or infinite); take an earlier checkpoint"
        )
    return state, meta


def read_labels(path_or_url: str) -> Tensor:
    """Pseudo-labels that SeLa's files hold beside the weights ("labels", in training files "L").

    Returns:
        Cluster of every training image, heads x images, int64.

    Raises:
        UserError: see `read_weights`; or the file holds no labels.
    """
    return read_file(path_or_url, _labels)


def _labels(checkpoint: Mapping[str, Any], where: str) -> Tensor:
    labels = next((checkpoint[key] for key in ("labels", "L") if key in checkpoint), None)
    if not isinstance(labels, Tensor) or labels.ndim not in (1, 2) or labels.is_floating_point():
        raise UserError(
            f"{where}: holds no labels of images (expected whole numbers under 'labels' or 'L'); "
            f"its entries: {listed(map(str, checkpoint))}"
        )
    return labels.long().reshape(-1, labels.shape[-1])


_T = TypeVar("_T")


def read_file(path_or_url: str, take: Callable[[Mapping[str, Any], str], _T]) -> _T:
    """Read a file, or an address into the cache, and take something from it.

    Args:
        path_or_url: file or address.
        take: from the file's entries and its name, for errors, to what is wanted.

    Raises:
        UserError: see `read_weights`.
    """
    path_or_url = str(path_or_url)
    if not is_url(path_or_url):
        return take(read_checkpoint(path_or_url), path_or_url)
    path, fresh = fetch(path_or_url)
    try:
        return take(read_checkpoint(path), path_or_url)
    except UserError as error:
        if fresh:
            path.unlink(missing_ok=True)
            raise UserError(f"{error}; downloaded from {path_or_url} and thrown away") from error
        raise UserError(f"{error}; delete {path} to download it again") from error


def raw_state(checkpoint: Mapping[str, Any], where: str) -> Mapping[str, Tensor]:
    """Names and tensors of a checkpoint already read, as they are in it.

    Raises:
        UserError: nothing in it is a state dict.
    """
    candidates = [checkpoint[key] for key in WRAPPERS if key in checkpoint] + [checkpoint]
    state = next((c for c in candidates if _is_state(c)), None)
    if state is None:
        raise UserError(
            f"{where}: holds no network weights (expected names and tensors, or those under 'state_dict'); "
            f"its entries: {listed(map(str, checkpoint))}"
        )
    return state


def unwrap(checkpoint: Mapping[str, Any], where: str) -> tuple[State, dict[str, Any]]:
    """Flat state dict and the "model" entry of a checkpoint already read.

    Raises:
        UserError: nothing in it is a state dict, or two names fall together.
    """
    state = adapted(raw_state(checkpoint, where), where)
    flat = {flat_name(name): tensor for name, tensor in state.items()}
    if len(flat) < len(state):
        raise UserError(
            f"{where}: holds the same parameters with and without 'module.' or 'backbone.'; give a file with one kind"
        )
    meta = checkpoint.get("model")
    return flat, dict(meta) if isinstance(meta, Mapping) and not _is_state(meta) else {}


def _is_state(candidate: Any) -> bool:
    return (
        isinstance(candidate, Mapping)
        and len(candidate) > 0
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in candidate.items())
    )


_SPELLINGS = (("_orig_mod.", ""), ("features.module.", "features."), ("top_layer.0.", "top_layer."))


def flat_name(name: str) -> str:
    """The flat name; published files of DeepCluster and SeLa have spellings of their own."""
    for published, ours in _SPELLINGS:
        name = name.replace(published, ours)
    return name.removeprefix("module.").removeprefix("backbone.")


def listed(names: Iterable[str]) -> str:
    """The first of the names, separated by commas, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
