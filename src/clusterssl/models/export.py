"""A backbone's way out: one small writer for each format that other software loads.

Every file is read back by the library it is meant for, where that is installed, and its features are compared with the
network's before it appears under its name.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clusterssl.errors import UserError
from clusterssl.files import first_line
from clusterssl.models import exported as names_of
from clusterssl.models import writers
from clusterssl.models.exported import Exported, Features

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """One way to write a backbone.

    Args:
        file: name of the file or folder, with {name} and {arch}.
        write: writes it to a path that does not exist yet.
        load: reads it back as its users do, images to features; None when what they use is not installed.
        refuses: why a network cannot take this form, "" when it can.
        use: how to load it, with {file}, {arch}, {timm}, {height}, {width}.
        tolerance: largest difference of features that passes, as a share of the largest feature where that exceeds 1.
        heads: whether projection heads, prototypes and classifiers can go along.
    """

    file: str
    write: Callable[[Exported, Path], None]
    load: Callable[[Exported, Path], Features | None]
    refuses: Callable[[Exported], str]
    use: str
    tolerance: float = 1e-5
    heads: bool = False


FORMATS: dict[str, Format] = {
    "torchvision": Format(
        "{name}.torchvision.pth", writers.write_torchvision, writers.load_torchvision, names_of.no_torchvision,
        'model = torchvision.models.{arch}(); model.set_submodule("{classifier}", torch.nn.Identity()); '
        'model.load_state_dict(torch.load("{file}", weights_only=True))',
    ),
    "timm": Format(
        "{name}.timm.pth", writers.write_timm, writers.load_timm, names_of.no_timm,
        'model = timm.create_model("{timm}", num_classes=0, checkpoint_path="{file}")',
    ),
    "safetensors": Format(
        "{name}.safetensors", writers.write_safetensors, writers.load_safetensors, names_of.no_safetensors,
        'weights = safetensors.torch.load_file("{file}"), or --pretrained {file} here; the card beside it says more',
        heads=True,
    ),
    "huggingface": Format(
        "{name}.huggingface", writers.write_folder, writers.load_folder, names_of.no_folder,
        'model = timm.create_model("local-dir:{file}", pretrained=True); once uploaded, "hf-hub:USER/NAME"',
    ),
    "onnx": Format(
        "{name}.onnx", writers.write_onnx, writers.load_onnx, names_of.no_onnx,
        'session = onnxruntime.InferenceSession("{file}"); '
        'session.run(None, {{"images": float32 array N x 3 x {height} x {width}}})', tolerance=1e-4, heads=True,
    ),
    "torchscript": Format(
        "{name}.torchscript.pt", writers.write_torchscript, writers.load_torchscript, names_of.takes_all,
        'model = torch.jit.load("{file}")', heads=True,
    ),
    "detectron2": Format(
        "{name}.detectron2.pth", writers.write_detectron2, writers.load_nothing, names_of.no_resnet,
        'MODEL.WEIGHTS "{file}" with MODEL.RESNETS.STRIDE_IN_1X1 False, INPUT.FORMAT "RGB", '
        "MODEL.PIXEL_MEAN {mean255}, MODEL.PIXEL_STD {std255}",
    ),
    "detr": Format(
        "{name}.detr.pth", writers.write_detr, writers.load_detr, names_of.no_resnet,
        "in models/backbone.py of facebookresearch/detr, class Backbone, change pretrained=is_main_process() to "
        'pretrained=False and add below that call: backbone.load_state_dict(torch.load("{file}", weights_only=True), '
        "strict=False); then train with --backbone {arch}",
    ),
}  # fmt: skip


def check_formats(names: Sequence[str]) -> None:
    """Refuse names that are no formats.

    Raises:
        UserError: an unknown name.
    """
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        raise UserError(f"--format {' '.join(unknown or names)}: choose among {', '.join(FORMATS)}")


def export(exported: Exported, names: Sequence[str], folder: str | Path, *, overwrite: bool = False) -> list[Path]:
    """Write a backbone in several formats; nothing appears that its reader did not understand.

    Args:
        exported: what to write.
        names: keys of `FORMATS`.
        folder: where to; made if need be.
        overwrite: replace files that exist.

    Returns:
        Paths of what was written, in the order of `names`.

    Raises:
        UserError: unknown format, one that cannot hold this network or needs what is not installed, a file that
            exists, or a folder that cannot be written.
    """
    check_formats(names)
    folder = Path(folder)
    targets = {name: folder / FORMATS[name].file.format(name=exported.name, arch=exported.arch) for name in names}
    for name, target in targets.items():
        _check(exported, name, target, overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export.") as aside:
            for name, target in targets.items():
                _write(exported, name, Path(aside) / target.name, target)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written ({first_line(error)})") from error
    return list(targets.values())


def _check(exported: Exported, name: str, target: Path, overwrite: bool) -> None:
    if exported.network is not None and not FORMATS[name].heads:
        able = ", ".join(key for key, form in FORMATS.items() if form.heads)
        raise UserError(f"--format {name} --head: this format holds a backbone alone; with heads go {able}")
    why = FORMATS[name].refuses(exported)
    if why:
        raise UserError(f"--format {name}: {why}")
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists already; choose another --output or --name, or give --overwrite")


def _write(exported: Exported, name: str, aside: Path, target: Path) -> None:
    form = FORMATS[name]
    form.write(exported, aside)
    difference = verify(exported, name, aside)
    for part in sorted(aside.parent.iterdir()):  # a model card may lie beside
        _move(part, target.parent / part.name)
    proof = (
        "not loaded, what reads it is not installed" if difference is None else f"features differ by {difference:.1e}"
    )
    logger.info("%s (%s)", target, proof)
    logger.info("    %s", usage(exported, name, target))


def _move(source: Path, target: Path) -> None:
    if source.is_dir():
        target.mkdir(exist_ok=True)
        for part in source.iterdir():
            _move(part, target / part.name)
    else:
        os.replace(source, target)  # noqa: PTH105 - also over an existing file


@torch.no_grad()
def verify(exported: Exported, name: str, path: Path) -> float | None:
    """Largest difference between the features of the file at `path` and the network's; None where nothing reads it.

    Raises:
        RuntimeError: they differ by more than the format's tolerance.
    """
    features = FORMATS[name].load(exported, path)
    if features is None:
        return None
    images = torch.randn(2, 3, *exported.image_size, generator=torch.Generator().manual_seed(0))
    pairs = list(zip(exported.outputs(images), features(images), strict=True))
    difference = max(float((a - b).abs().max()) / max(1.0, float(a.abs().max())) for a, b in pairs)
    if not difference <= FORMATS[name].tolerance:
        raise RuntimeError(f"--format {name}: the features of the written file differ by {difference:.1e}")
    return difference


def usage(exported: Exported, name: str, path: Path | str) -> str:
    """How to load a file of a format."""
    if name == "huggingface" and not names_of.timm_arch(exported):
        return f'model = clusterssl.hub.backbone("{Path(path) / "model.safetensors"}")'
    arch = names_of.torchvision_arch(exported) or exported.arch
    return FORMATS[name].use.format(
        file=path, arch=arch, timm=names_of.timm_arch(exported),
        classifier=names_of.classifier_name(exported), height=exported.image_size[0],
        width=exported.image_size[1], mean255=_bytes(exported.mean), std255=_bytes(exported.std),
    )  # fmt: skip


def _bytes(values: Sequence[float]) -> list[float]:
    return [round(255 * value, 3) for value in values]
