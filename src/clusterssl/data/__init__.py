"""Images: sources, multi-crop, augmentation on the training device, loaders."""

from __future__ import annotations

import clusterssl.early  # noqa: F401 - before torch

from clusterssl.data.augment import MEAN, STD, Augment, normalize
from clusterssl.data.badimages import BadImages
from clusterssl.data.dataset import Batch, MultiCropDataset, collate
from clusterssl.data.decode import BadImageError
from clusterssl.data.evalset import EvalBatch, eval_batches, resize_for
from clusterssl.data.loader import Loader
from clusterssl.data.multicrop import CropParams, MultiCrop
from clusterssl.data.resident import Resident, reside
from clusterssl.data.sampler import PositionSampler, epoch_batches
from clusterssl.data.source import Source, fingerprint, open_source

__all__ = [
    "MEAN",
    "STD",
    "Augment",
    "BadImageError",
    "BadImages",
    "Batch",
    "CropParams",
    "EvalBatch",
    "Loader",
    "MultiCrop",
    "MultiCropDataset",
    "PositionSampler",
    "Resident",
    "Source",
    "collate",
    "epoch_batches",
    "eval_batches",
    "fingerprint",
    "normalize",
    "open_source",
    "reside",
    "resize_for",
]
