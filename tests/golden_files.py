"""Reading the golden vectors under tests/golden (see the README there)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "golden"


class Golden:
    """One file of golden vectors; arrays by name, parameters as dictionaries."""

    def __init__(self, name: str) -> None:
        self._arrays = np.load(FOLDER / f"{name}.npz")

    def __getitem__(self, key: str) -> np.ndarray:
        return self._arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def params(self, case: str) -> dict[str, Any]:
        return json.loads(str(self._arrays[f"{case}_params"]))

    def names(self) -> list[str]:
        return list(self._arrays.files)
