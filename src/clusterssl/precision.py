"""Number formats of the forward and backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Precision:
    """Autocast type (None: float32 throughout); float16 gradients are scaled."""

    dtype: torch.dtype | None = None

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Context of the forward pass."""
        return nullcontext() if self.dtype is None else torch.autocast(device.type, dtype=self.dtype)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Gradient scaler; does nothing unless the type is float16."""
        return torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
