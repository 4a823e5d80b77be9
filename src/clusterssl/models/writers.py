"""Writers and readers of the formats of `export`, two small functions each.

Optional libraries (timm, safetensors, onnx, onnxruntime) are imported where they are used.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from clusterssl.errors import UserError
from clusterssl.files import first_line
from clusterssl.models.build import build_backbone
from clusterssl.models.card import hub_config, model_card
from clusterssl.models.exported import (
    Exported,
    Features,
    WithHeads,
    absent,
    classifier_name,
    detectron2_names,
    listed,
    plain_state,
    timm_arch,
    torchvision_arch,
    torchvision_names,
)
from clusterssl.models.network import Network
from clusterssl.models.weights import published_state_dict


def write_torchvision(exported: Exported, path: Path) -> None:
    """Flat state dict with torchvision's names, without classifier."""
    torch.save(torchvision_names(exported), path)


def load_torchvision(exported: Exported, path: Path) -> Features:
    """torchvision's model with these weights."""
    return _filled(_torchvision_model(exported), torch.load(path, weights_only=True))


def _torchvision_model(exported: Exported, **options: Any) -> nn.Module:
    arch = torchvision_arch(exported)
    if arch in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    model = torchvision.models.get_model(arch, weights=None, **options)
    model.set_submodule(classifier_name(exported), nn.Identity())
    return model


def _filled(model: nn.Module, state: Mapping[str, Tensor]) -> Features:
    model.load_state_dict(dict(state))
    model.eval()
    return lambda images: listed(model(images))


def write_timm(exported: Exported, path: Path) -> None:
    """Flat state dict with timm's names, without classifier; those of its ResNets are torchvision's."""
    write_torchvision(exported, path)


def load_timm(exported: Exported, path: Path) -> Features | None:
    """timm's model with these weights."""
    if absent("timm"):
        return None
    import timm

    model = timm.create_model(timm_arch(exported), num_classes=0, checkpoint_path=str(path)).eval()
    return lambda images: listed(model(images))


def write_safetensors(exported: Exported, path: Path) -> None:
    """Published names and tensors without any code, architecture in the metadata, and a model card beside it."""
    from safetensors.torch import save

    heads = exported.network is not None
    state = published_state_dict(exported.network) if exported.network is not None else exported.backbone.state_dict()
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    path.write_bytes(save(tensors, _about(exported)))
    card = model_card(exported, library="", use=f'safetensors.torch.load_file("{path.name}")', heads=heads)
    path.with_name(path.name + ".md").write_text(card)


def _about(exported: Exported) -> dict[str, str]:
    size = "x".join(map(str, exported.image_size))
    return {"format": "pt", "arch": exported.arch, "stem": exported.stem, "image_size": size}


def load_safetensors(exported: Exported, path: Path) -> Features | None:
    """Our own network with these weights; heads are not compared."""
    from safetensors.torch import load_file

    if exported.network is not None:
        return _published(exported.network, load_file(path))
    return _filled(build_backbone(exported.arch, exported.stem), load_file(path))


def _published(network: Network, state: Mapping[str, Tensor]) -> Features:
    twin = copy.deepcopy(network)
    names = {published: name for name, published in zip(twin.state_dict(), published_state_dict(twin), strict=True)}
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    twin.load_state_dict({names[published]: tensor for published, tensor in state.items()})
    return lambda images: listed(WithHeads(twin.eval())(images))


def write_folder(exported: Exported, path: Path) -> None:
    """Folder as the Hugging Face Hub wants it: model.safetensors, config.json (timm's where it fits), README.md."""
    from safetensors.torch import save

    path.mkdir()
    timm_name = timm_arch(exported)
    state = torchvision_names(exported) if timm_name else plain_state(exported.backbone)
    (path / "model.safetensors").write_bytes(save(state, _about(exported)))
    (path / "config.json").write_text(json.dumps(hub_config(exported, timm_name), indent=1) + "\n")
    use = 'timm.create_model("hf-hub:USER/NAME", pretrained=True, num_classes=0)' if timm_name else ""
    (path / "README.md").write_text(model_card(exported, library="timm" if timm_name else "", use=use))


def load_folder(exported: Exported, path: Path) -> Features:
    """timm's model as it reads such a folder; our own where timm is absent or has no such network."""
    if timm_arch(exported) and not absent("timm"):
        import timm

        model = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0).eval()
        return lambda images: listed(model(images))
    from safetensors.torch import load_file

    return _filled(build_backbone(exported.arch, exported.stem), load_file(path / "model.safetensors"))


def write_onnx(exported: Exported, path: Path) -> None:
    """ONNX with input "images" of any number of rows, outputs "features" and "scores0", "scores1", ..."""
    example = torch.zeros(2, 3, *exported.image_size)
    names = ["features", *(f"scores{i}" for i in range(len(exported.outputs(example)) - 1))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                exported.module.eval(), (example,), dynamo=True, verbose=False, input_names=["images"],
                output_names=names, dynamic_shapes=({0: torch.export.Dim("rows")},),
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            raise UserError(_untranslated(error.__cause__ or error)) from error
    if program is None:
        raise UserError(_untranslated(None))
    program.save(str(path))


def _untranslated(error: BaseException | None) -> str:
    """Exporter and onnxscript come from different houses, and only those of the same year understand each other."""
    pair = f"torch {torch.__version__} with onnxscript {importlib.metadata.version('onnxscript')}"
    why = f" ({first_line(error)})" if error else ""
    return f"--format onnx: {pair} cannot translate this network{why}; take versions of one time, or torchscript"


def load_onnx(exported: Exported, path: Path) -> Features | None:
    """onnxruntime's outputs."""
    if absent("onnxruntime"):
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})]


def write_torchscript(exported: Exported, path: Path) -> None:
    """A program that needs torch alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises other formats; this one is asked for
        traced = torch.jit.trace(exported.module.eval(), torch.zeros(2, 3, *exported.image_size), check_trace=False)
        torch.jit.save(traced, str(path))


def load_torchscript(exported: Exported, path: Path) -> Features:
    """The program's outputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.load(str(path))
    return lambda images: listed(model(images))


def write_detectron2(exported: Exported, path: Path) -> None:
    """Plain dictionary as detectron2's checkpointer reads it; names are matched to any detector by their ends."""
    state = detectron2_names(torchvision_names(exported))
    torch.save({"model": state, "__author__": "clusterssl", "matching_heuristics": True}, path)


def load_nothing(exported: Exported, path: Path) -> None:
    """Nothing that installs in one command reads this format."""


def write_detr(exported: Exported, path: Path) -> None:
    """torchvision's names without batch counters, which DETR's frozen BatchNorm does not have."""
    state = torchvision_names(exported)
    torch.save({name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}, path)


def load_detr(exported: Exported, path: Path) -> Features:
    """The backbone as DETR builds it: torchvision's ResNet with frozen BatchNorm."""
    return _filled(
        _torchvision_model(exported, norm_layer=torchvision.ops.FrozenBatchNorm2d), torch.load(path, weights_only=True)
    )
