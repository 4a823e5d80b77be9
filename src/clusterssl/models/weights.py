"""Published and own checkpoints: strict loading, writing under the published names, whole networks from files.

`python -m clusterssl.models.weights FILE ...` says what files are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from clusterssl.errors import UserError
from clusterssl.models.build import MultiCropNet, build_backbone, build_model
from clusterssl.models.foreign import no_network
from clusterssl.models.headed import HeadedNet, build_headed, head_sizes
from clusterssl.models.identify import Look, classifier_as_head, describe, head_part, look_of
from clusterssl.models.network import Network
from clusterssl.models.reading import State, flat_name, listed, read_weights, unwrap
from clusterssl.models.selfclassifier import SelfClassifierNet, build_selfclassifier

logger = logging.getLogger(__name__)


def published_state_dict(model: nn.Module) -> State:
    """State dict with the names of the published files.

    SwAV, DeepCluster-v2: "module.conv1.weight"; Self-Classifier: "module.backbone.conv1.weight"; DeepCluster, SeLa:
    "features.0.weight".

    Args:
        model: a `Network`, bare, compiled or under DistributedDataParallel. Tensors are shared, not copied.
    """
    net = bare(model)
    before_all = getattr(net, "published_prefix", "module.")
    before_backbone = getattr(net, "published_backbone", "")
    return {
        before_all + (before_backbone if name.startswith("backbone.") else "") + flat_name(name): tensor
        for name, tensor in net.state_dict().items()
    }


def flat_state_dict(model: nn.Module) -> State:
    """State dict with flat names."""
    return {flat_name(name): tensor for name, tensor in model.state_dict().items()}


def bare(model: nn.Module) -> nn.Module:
    """The network inside the wrappers of DistributedDataParallel and torch.compile."""
    while not isinstance(model, Network):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def load_published(model: nn.Module, state: Mapping[str, Tensor], where: str = "checkpoint") -> None:
    """Load a state dict of published names, strictly: the inverse of `published_state_dict`.

    The heads of a `HeadedNet` take the sizes that they have in the state dict.

    Args:
        model: a `Network`, bare, compiled or under DistributedDataParallel.
        state: names with or without "module." and "backbone.".
        where: how errors call the source.

    Raises:
        UserError: names missing or unexpected, or shapes that differ; the model is then unchanged.
    """
    flat, _ = unwrap(state, where)
    net = bare(model)
    own = flat_state_dict(net)
    if isinstance(net, HeadedNet) and head_sizes(flat):
        own = {name: t for name, t in own.items() if not head_part(name)} | net.empty_heads(head_sizes(flat))
    _compare(flat, own, where)
    names = {flat_name(name): name for name in net.state_dict()}
    net.load_state_dict({names.get(name, name): tensor for name, tensor in flat.items()}, strict=False)


def load_backbone(backbone: nn.Module, path_or_url: str) -> list[str]:
    """Load the backbone's part of a checkpoint file or address, strictly on the backbone's names.

    Returns:
        Names that belong to a head, prototypes or classifier and were left aside (also logged).

    Raises:
        UserError: see `read_weights`; or names missing or unexpected, or shapes that differ.
    """
    state, _ = read_weights(path_or_url)
    return load_backbone_state(backbone, state, str(path_or_url))


def load_backbone_state(
    backbone: nn.Module, state: Mapping[str, Tensor], where: str = "checkpoint", *, tell: bool = True
) -> list[str]:  # fmt: skip
    """As `load_backbone`, from a flat state dict; what is left aside is not logged if `tell` is false."""
    classifier = str(getattr(backbone, "classifier_name", "") or "fc")
    extra = [name for name in state if head_part(name) or name.startswith((classifier + ".", "fc."))]
    extra = [name for name in extra if name not in backbone.state_dict()]
    trunk = {name: tensor for name, tensor in state.items() if name not in set(extra)}
    _compare(trunk, backbone.state_dict(), where)
    backbone.load_state_dict(trunk, strict=False)
    if tell:
        tell_left_aside(extra, where)
    return extra


def tell_left_aside(names: Sequence[str], where: str) -> None:
    """Log which parts of a checkpoint nobody uses, if there are any."""
    if names:
        parts = dict.fromkeys(head_part(name) or name.rpartition(".")[0] for name in names)
        logger.info("%s: left aside, not part of the backbone: %s (%d tensors)", where, listed(parts), len(names))


def init_model(model: Network, path_or_url: str) -> list[str]:
    """Start a network from a published or own checkpoint of any method (`--init`).

    The backbone is mandatory and strict. Heads, prototypes and classifiers are taken where all names and shapes agree,
    else one line of the log names what keeps its random values.

    Returns:
        Parts left at random: "projection_head", "prototypes", "top_layer0", "mlp_head", "cls_0", ...

    Raises:
        UserError: see `load_backbone`.
    """
    state, _ = read_weights(path_or_url)
    load_backbone_state(model.backbone, {n: t for n, t in state.items() if not head_part(n)}, path_or_url)
    random = []
    for part, module in model.named_children():
        own = {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
        offered = {name: tensor for name, tensor in state.items() if head_part(name) == part}
        if part == "backbone" or not own:
            continue
        if _differences(offered, own):
            random.append(part)
        else:
            module.load_state_dict({n.removeprefix(part + "."): t for n, t in offered.items()}, strict=False)
    kept = f"; left at random: {', '.join(random)} (absent or of another shape there)" if random else ""
    logger.info("network initialised from %s%s", path_or_url, kept)
    return random


def model_from_weights(path_or_url: str) -> Network:
    """The whole network of a checkpoint of any method: architecture, heads and prototypes as the file has them.

    Raises:
        UserError: see `read_weights`; or the file does not tell its architecture.
    """
    state, look = _read_known(path_or_url)
    model = _MAKERS[look.net](look.arch, look.stem, **look.options)
    load_published(model, state, path_or_url)
    return model


_MAKERS: dict[str, Callable[..., Network]] = {
    MultiCropNet.net: build_model,
    HeadedNet.net: build_headed,
    SelfClassifierNet.net: build_selfclassifier,
}


def backbone_from_weights(path_or_url: str) -> nn.Module:
    """The backbone of a checkpoint of any method, of the architecture that the file tells.

    Raises:
        UserError: see `read_weights`; or the file does not tell its architecture.
    """
    state, look = _read_known(path_or_url)
    backbone = build_backbone(look.arch, look.stem)
    load_backbone_state(backbone, state, path_or_url)
    return backbone


def _read_known(path_or_url: str) -> tuple[State, Look]:
    state, meta = read_weights(path_or_url)
    state = classifier_as_head(state)
    look = describe(state, meta)
    if look is None:
        why = no_network(state) or (
            "its names and shapes are of none of our residual and convolutional networks, and it does not say which "
            f"one it is (first names: {listed(state)}); build the network by name and load into it"
        )
        raise UserError(f"{path_or_url}: {why}")
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
    return [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds if names]


def _compare(state: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    differences = _differences(state, own)
    if differences:
        why = no_network(state) or f"does not fit this network; {'; '.join(differences)}{look_of(state)}"
        raise UserError(f"{where}: {why}")


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


if __name__ == "__main__":
    from clusterssl.models.contents import main

    main()
