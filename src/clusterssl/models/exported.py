"""What is exported, what other libraries call it, and which of them can hold it."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from clusterssl.models.network import Network

State = dict[str, Tensor]
Features = Callable[[Tensor], list[Tensor]]
"""images N x 3 x H x W to features N x F and, with heads, the scores of each"""

_DETECTORS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_VITS = {"vit_tiny": "vit_tiny_patch16_224", "vit_small": "vit_small_patch16_224", "vit_base": "vit_base_patch16_224"}
_NUMBERED = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


@dataclass(frozen=True)
class Exported:
    """A network on its way out.

    Args:
        backbone: frozen, on the CPU, in evaluation mode.
        arch, stem: as `build_backbone` takes them.
        image_size: height and width of the images it is meant for.
        name: of the files.
        source: where the weights are from, for the model card.
        mean, std: of the pixels in 0..1 it was trained with.
        network: the whole network, when its heads are exported too.
        results: lines on its evaluations, for the model card.
    """

    backbone: nn.Module
    arch: str
    stem: str = "imagenet"
    image_size: tuple[int, int] = (224, 224)
    name: str = "backbone"
    source: str = ""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    network: Network | None = None
    results: tuple[str, ...] = ()

    @property
    def module(self) -> nn.Module:
        """From images to features, or to features and the scores of every head."""
        return self.backbone if self.network is None else WithHeads(self.network)

    @torch.no_grad()
    def outputs(self, images: Tensor) -> list[Tensor]:
        """Features and, with heads, the scores of each."""
        return listed(self.module(images))


class WithHeads(nn.Module):
    """Features and scores of all heads from one pass of the backbone."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.backbone = network.backbone
        self.heads = copy.copy(network)
        self.heads.features = lambda crops: crops[0]  # type: ignore[method-assign]  # they are features already

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.backbone(images)
        return features, *self.heads.scores([features])


def listed(output: Any) -> list[Tensor]:
    """One output or several as a list."""
    return [output] if isinstance(output, Tensor) else list(output)


def torchvision_arch(exported: Exported) -> str:
    """Name of the torchvision model with these layers, "" if there is none."""
    name = "resnet50" if exported.arch == "sela_resnetv1" else exported.arch
    return name if exported.stem == "imagenet" and name in torchvision.models.list_models(torchvision.models) else ""


def timm_arch(exported: Exported) -> str:
    """Name of the timm model with these layers and names, "" if there is none."""
    if exported.arch.startswith("timm:"):
        return exported.arch.removeprefix("timm:")
    found = torchvision_arch(exported)
    return found if found in _DETECTORS else _VITS.get(exported.arch, "")


def takes_all(exported: Exported) -> str:
    """No network is refused."""
    return ""


def no_torchvision(exported: Exported) -> str:
    """Why torchvision cannot load it."""
    return "" if torchvision_arch(exported) else _foreign(exported, "torchvision")


def no_timm(exported: Exported) -> str:
    """Why timm cannot load it."""
    return "" if timm_arch(exported) else _foreign(exported, "timm")


def no_resnet(exported: Exported) -> str:
    """Why a detector built on torchvision's layout of a ResNet cannot load it."""
    return "" if torchvision_arch(exported) in _DETECTORS else _foreign(exported, "the detector")


def _foreign(exported: Exported, library: str) -> str:
    return (
        f"{library} has no network with the layers of {exported.arch} ({exported.stem} stem); "
        "take safetensors, huggingface, onnx or torchscript"
    )


def no_safetensors(exported: Exported) -> str:
    """Why safetensors cannot be written."""
    return absent("safetensors")


def no_folder(exported: Exported) -> str:
    """Why a folder for the Hugging Face Hub cannot be written."""
    return absent("safetensors")


def no_onnx(exported: Exported) -> str:
    """Why ONNX cannot be written."""
    return absent("onnx", "onnxscript")


def absent(*libraries: str) -> str:
    """What to install, "" when all is there."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(missing)}; run pip install {' '.join(missing)}" if missing else ""


def torchvision_names(exported: Exported) -> State:
    """State dict of the backbone with torchvision's names."""
    state = plain_state(exported.backbone)
    if exported.arch != "sela_resnetv1":
        return state
    found = {name: re.fullmatch(r"features\.(\d+)\.(.*)", name) for name in state}
    return {f"{_NUMBERED[match[1]]}.{match[2]}": state[name] for name, match in found.items() if match}


def detectron2_names(state: Mapping[str, Tensor]) -> State:
    """Names of detectron2's ResNets (stem, res2 to res5, norm, shortcut) from torchvision's."""
    renamed = {}
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):  # its frozen BatchNorm has none
            continue
        name = re.sub(r"layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
        name = re.sub(r"bn(\d)", r"conv\1.norm", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        renamed[name if name.startswith("res") else f"stem.{name}"] = tensor
    return renamed


def plain_state(module: nn.Module) -> State:
    """Copies, so that files hold nothing but these tensors."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}


def classifier_name(exported: Exported) -> str:
    """What torchvision calls the last layer, which is not exported."""
    return str(getattr(exported.backbone, "classifier_name", "fc"))
