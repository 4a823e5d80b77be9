"""What a pretraining script would assemble for a command line, taken from the script itself."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from clusterssl.dist import World
from clusterssl.errors import UserError


@dataclass(frozen=True)
class Blueprint:
    """Arguments of `pretrain.assemble`."""

    name: str
    """of the method"""
    config: Any
    make_model: Callable[[Any], Any]
    make_method: Callable[..., Any]
    more: dict[str, Any]
    """keyword arguments"""


def read_script(script: Path, words: Sequence[str], nodes: int, per_node: int) -> Blueprint:
    """Run the script's own `main` on a command line, up to where it would join other ranks and assemble its parts.

    Args:
        script: one of main_*.py.
        words: its flags, in its own or its published vocabulary.
        nodes: machines of the job.
        per_node: ranks on each.

    Raises:
        UserError: bad flags, in the script's words, or a script that does not pretrain.
    """
    module = _loaded(script)
    if not all(hasattr(module, name) for name in ("main", "join", "assemble", "fit")):
        raise UserError(f"{script.name}: only pretraining can be planned; give one of main_*.py")
    found: list[Blueprint] = []

    def take_down(name: str, config: Any, world: World, make_model: Any, make_method: Any, **more: Any) -> Blueprint:
        return Blueprint(name, config, make_model, make_method, more)

    vars(module).update(join=lambda run: nullcontext(World()), assemble=take_down, fit=found.append)
    with _started(script, words, nodes, per_node):
        module.main()
    return found[0]


def _loaded(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"planned_{script.stem}", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look up their annotations there
    spec.loader.exec_module(module)
    return module


@contextmanager
def _started(script: Path, words: Sequence[str], nodes: int, per_node: int) -> Iterator[None]:
    """The command line and the variables that a rank of the job would see; some published flags count per node."""
    argv, environment = sys.argv, dict(os.environ)
    sys.argv = [str(script), *words]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": nodes * per_node, "LOCAL_WORLD_SIZE": per_node}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        yield
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
