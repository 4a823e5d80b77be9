"""Entry points of torch.hub; clusterssl.hub describes them."""

import pathlib
import sys

dependencies = ["torch", "torchvision"]

_src = str(pathlib.Path(__file__).resolve().parent / "src")
sys.path.insert(0, _src)
try:
    from clusterssl.hub import *  # noqa: F403
finally:
    sys.path.remove(_src)
