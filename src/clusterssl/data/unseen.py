"""A dataset of which only the size matters."""

from __future__ import annotations

import numpy as np
from torch import Tensor


class Unseen:
    """As many images as are said, which nobody looks at; they have no names that labels could be matched by."""

    def __init__(self, number: int) -> None:
        self.classes: list[str] = []
        self.labels = np.full(number, -1, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, i: int) -> str:
        """Stands for a path."""
        return str(i)

    def load(self, i: int) -> Tensor:
        """There is nothing to load."""
        raise NotImplementedError
