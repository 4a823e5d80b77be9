"""Published and own checkpoints: reading, naming, strict loading.

Published files hold SwAV's flat names with a "module." prefix; in memory the same names go without the prefix
("conv1.weight", "projection_head.0.weight", "prototypes.weight").
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from clusterssl.errors import UserError
from clusterssl.files import read_checkpoint
from clusterssl.models.build import MultiCropNet, build_backbone, build_model
from clusterssl.models.download import fetch, is_url
from clusterssl.models.identify import HEAD_PARTS, Look, describe, look_of

logger = logging.getLogger(__name__)

State = dict[str, Tensor]
_WRAPPERS = ("state_dict", "model")
_LISTED = 8


def read_weights(path_or_url: str) -> tuple[State, dict[str, Any]]:
    """Parameters of a checkpoint file or address, and what an own checkpoint says of its network.

    Understands a flat state dict and one wrapped in "state_dict" (or "model"), with and without "module.".

    Returns:
        Flat state dict without "module.", and the checkpoint's "model" entry ({} in files of others):
        arch, stem, size_crops, ...

    Raises:
        UserError: missing, unreadable, truncated, unsafe file, failed download, or a file without weights.
    """
    state, meta = _read(str(path_or_url))
    if not all(bool(tensor.isfinite().all()) for tensor in state.values() if tensor.is_floating_point()):
        raise UserError(
            f"{path_or_url}: holds weights that are not finite (NaN or infinite); take an earlier checkpoint"
        )
    return state, meta


def _read(path_or_url: str) -> tuple[State, dict[str, Any]]:
    if not is_url(path_or_url):
        return unwrap(read_checkpoint(path_or_url), path_or_url)
    path, fresh = fetch(path_or_url)
    try:
        return unwrap(read_checkpoint(path), path_or_url)
    except UserError as error:
        if fresh:
            path.unlink(missing_ok=True)
            raise UserError(f"{error}; downloaded from {path_or_url} and thrown away") from error
        raise UserError(f"{error}; delete {path} to download it again") from error


def unwrap(checkpoint: Mapping[str, Any], where: str) -> tuple[State, dict[str, Any]]:
    """Flat state dict without "module." and the "model" entry of a checkpoint already read.

    Raises:
        UserError: nothing in it is a state dict, or two names fall together.
    """
    candidates = [checkpoint[key] for key in _WRAPPERS if key in checkpoint] + [checkpoint]
    state = next((c for c in candidates if _is_state(c)), None)
    if state is None:
        raise UserError(
            f"{where}: holds no network weights (expected names and tensors, or those under 'state_dict'); "
            f"its entries: {_listed(map(str, checkpoint))}"
        )
    flat = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if len(flat) < len(state):
        raise UserError(f"{where}: holds the same parameters with and without 'module.'; give a file with one of them")
    meta = checkpoint.get("model")
    return flat, dict(meta) if isinstance(meta, Mapping) and meta is not state else {}


def _is_state(candidate: Any) -> bool:
    return (
        isinstance(candidate, Mapping)
        and len(candidate) > 0
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in candidate.items())
    )


def published_state_dict(model: nn.Module) -> State:
    """State dict with the published flat names and "module." prefix.

    Args:
        model: a `MultiCropNet`, bare, compiled or under DistributedDataParallel. Tensors are shared, not copied.
    """
    return {"module." + name: tensor for name, tensor in flat_state_dict(model).items()}


def flat_state_dict(model: nn.Module) -> State:
    """State dict with the published flat names, without "module."."""
    return {_flat(name): tensor for name, tensor in model.state_dict().items()}


def _flat(name: str) -> str:
    return name.replace("_orig_mod.", "").removeprefix("module.").removeprefix("backbone.")


def load_published(model: nn.Module, state: Mapping[str, Tensor], where: str = "checkpoint") -> None:
    """Load a state dict of published names, strictly: the inverse of `published_state_dict`.

    Args:
        model: a `MultiCropNet`, bare, compiled or under DistributedDataParallel.
        state: names with or without "module.".
        where: how errors call the source.

    Raises:
        UserError: names missing or unexpected, or shapes that differ; the model is then unchanged.
    """
    flat, _ = unwrap(state, where)
    own = {_flat(name): name for name in model.state_dict()}
    _compare(flat, flat_state_dict(model), where)
    model.load_state_dict({own[name]: tensor for name, tensor in flat.items()}, strict=False)


def load_backbone(backbone: nn.Module, path_or_url: str) -> list[str]:
    """Load the backbone's part of a checkpoint file or address, strictly on the backbone's names.

    Returns:
        Names that belong to a head, prototypes or classifier and were left aside (also logged).

    Raises:
        UserError: see `read_weights`; or names missing or unexpected, or shapes that differ.
    """
    state, _ = read_weights(path_or_url)
    return load_backbone_state(backbone, state, str(path_or_url))


def load_backbone_state(backbone: nn.Module, state: Mapping[str, Tensor], where: str = "checkpoint") -> list[str]:
    """As `load_backbone`, from a flat state dict without "module."."""
    classifier = str(getattr(backbone, "classifier_name", "") or "fc")
    extra = [name for name in state if name.split(".")[0] in HEAD_PARTS or name.startswith((classifier + ".", "fc."))]
    extra = [name for name in extra if name not in backbone.state_dict()]
    trunk = {name: tensor for name, tensor in state.items() if name not in set(extra)}
    _compare(trunk, backbone.state_dict(), where)
    backbone.load_state_dict(trunk, strict=False)
    if extra:
        logger.info("%s: left aside, not part of the backbone: %s", where, _listed(extra))
    return extra


def init_model(model: MultiCropNet, path_or_url: str) -> list[str]:
    """Start a network from a published or own checkpoint (`--init`).

    The backbone is mandatory and strict. Head and prototypes are taken where all names and shapes agree,
    else one line of the log names what keeps its random values.

    Returns:
        Parts left at random: "projection_head", "prototypes", both or none.

    Raises:
        UserError: see `load_backbone`.
    """
    state, _ = read_weights(path_or_url)
    parts = {part: {n: t for n, t in state.items() if n.split(".")[0] == part} for part in HEAD_PARTS}
    load_backbone_state(
        model.backbone, {n: t for n, t in state.items() if n.split(".")[0] not in HEAD_PARTS}, path_or_url
    )
    random = []
    for part, offered in parts.items():
        own = {f"{part}.{name}": tensor for name, tensor in getattr(model, part).state_dict().items()}
        if own and _differences(offered, own):
            random.append(part)
        elif own:
            fitting = {name.removeprefix(part + "."): tensor for name, tensor in offered.items()}
            getattr(model, part).load_state_dict(fitting, strict=False)
    kept = f"; left at random: {', '.join(random)} (absent or of another shape there)" if random else ""
    logger.info("network initialised from %s%s", path_or_url, kept)
    return random


def model_from_weights(path_or_url: str) -> MultiCropNet:
    """The whole network of a SwAV-family checkpoint: architecture, head and prototypes as the file has them.

    Raises:
        UserError: see `read_weights`; or the file does not tell its architecture.
    """
    state, look = _read_known(path_or_url)
    model = build_model(look.arch, look.stem, look.hidden_mlp, look.feat_dim, look.nmb_prototypes, look.head_bn)
    load_published(model, state, path_or_url)
    return model


def backbone_from_weights(path_or_url: str) -> nn.Module:
    """The backbone of a SwAV-family checkpoint, of the architecture that the file tells.

    Raises:
        UserError: see `read_weights`; or the file does not tell its architecture.
    """
    state, look = _read_known(path_or_url)
    backbone = build_backbone(look.arch, look.stem)
    load_backbone_state(backbone, state, path_or_url)
    return backbone


def _read_known(path_or_url: str) -> tuple[State, Look]:
    state, meta = read_weights(path_or_url)
    look = describe(state, meta)
    if look is None:
        raise UserError(
            f"{path_or_url}: its names and shapes are of none of our residual and convolutional networks, and it does "
            f"not say which one it is (first names: {_listed(state)}); build the network by name and load into it"
        )
    return state, look


def _differences(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """What keeps `state` from fitting `own` exactly, one phrase per kind; [] when it fits."""
    # Files of PyTorch < 0.4.1 have no batch counters; torch's own strict loading does not ask for them either.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} {_size(state[name])} instead of {_size(own[name])}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return [f"{len(names)} {kind}: {_listed(names)}" for kind, names in kinds if names]


def _compare(state: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    differences = _differences(state, own)
    if differences:
        raise UserError(f"{where}: does not fit this network; {'; '.join(differences)}{look_of(state)}")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
