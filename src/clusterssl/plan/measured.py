"""Speeds that were measured, from bench/results; none is made up where none fits.

Read are results of whole runs, with `commands` (name -> command line) and `means` (name -> figures, of which
`crops_per_s` is that of one CPU core), and of training steps, with `options` (their flags) and `steps` -> "ours" ->
`images_per_s` of one process, without its loading of images. A figure fits a training of the same method, network and
crops on the same kind of processor.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clusterssl.errors import UserError
from clusterssl.options import num_views
from clusterssl.plan.blueprint import Blueprint, read_script

logger = logging.getLogger(__name__)


class Speed(NamedTuple):
    """What one rank did."""

    images_per_s: float
    source: str
    """file, processor, and what was measured"""


def traits(blueprint: Blueprint) -> tuple[Any, ...]:
    """What two trainings have in common when the speed of one tells that of the other."""
    data = blueprint.config.data
    sides = tuple(max(size) for size in data.size_crops)
    return blueprint.name, blueprint.config.model.arch, tuple(data.nmb_crops), sides


def fitting(blueprint: Blueprint, results: Path, scripts: Path, *, gpu: bool) -> list[Speed]:
    """Speeds measured of such trainings, in the order of the files' names.

    Args:
        blueprint: of the training.
        results: folder of JSON files.
        scripts: folder of the scripts that their commands name.
        gpu: whether it is to run on GPUs.
    """
    found = []
    for path in sorted(results.glob("*.json")):
        try:
            record = json.loads(path.read_text())
            result, hardware = record["result"], record["hardware"]
            known = [*_runs(result, scripts), *_steps(result)] if bool(hardware["gpu"]) == gpu else []
            processor = hardware["gpu"] or hardware["cpu"]
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            logger.warning("%s: not a result of a bench, passed over", path)
            continue
        found += [
            Speed(rate, f"{path.name}, {kind} on {processor}")
            for what, rate, kind in known
            if what == traits(blueprint)
        ]
    return found


def _runs(result: dict[str, Any], scripts: Path) -> Iterator[tuple[tuple[Any, ...], float, str]]:
    """Traits, images/s and kind of measurement of whole runs."""
    for name, command in result["commands"].items() if "means" in result and "commands" in result else ():
        rate, blueprint = result["means"].get(name, {}).get("crops_per_s"), _blueprint(command, scripts)
        if rate and blueprint is not None:
            yield traits(blueprint), rate / num_views(blueprint.config.data), "whole run on one core, CPU time,"


def _steps(result: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], float, str]]:
    """The same of training steps of SwAV."""
    if "steps" in result and "ours" in result["steps"]:
        flags, rate = result["options"], result["steps"]["ours"]["images_per_s"]
        kind = f"steps of {flags['batch_size']} images without loading"
        yield ("swav", flags["arch"], tuple(flags["nmb_crops"]), tuple(flags["size_crops"])), rate, kind


def _blueprint(command: str, scripts: Path) -> Blueprint | None:
    words = shlex.split(command)
    script = next((at for at, word in enumerate(words) if word.endswith(".py")), None)
    if script is None or not (scripts / words[script]).is_file():
        return None
    try:
        return read_script(scripts / words[script], words[script + 1 :], 1, 1)
    except UserError:  # a flag that exists no more
        return None
