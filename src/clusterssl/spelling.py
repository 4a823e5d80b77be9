"""What somebody meant who wrote a name that does not exist: a slip of the fingers, or what other programs call it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

CLOSE = 0.75
"""of difflib's ratio, from which on a whole name counts as a slip of another"""

ELSEWHERE = (
    ("clusters prototypes classes concepts k kk", "nmb_prototypes nmb_cluster cls_size ncl k nmb_clusters"),
    ("lr learning_rate base_learning_rate", "base_lr lr"),
    ("weight_decay", "wd"),
    ("bs b batch per_gpu_batch_size", "batch_size"),
    ("j cpus", "workers"),
    ("temp tau", "temperature temp row_tau"),
    ("img_size imsize resolution crop_size input_size", "size_crops image_size"),
    ("output output_dir outdir save save_dir save_path log_dir exp work_dir resume", "dump_path out"),
    ("data dataset data_dir train_dir train_data root input folder", "data_path images"),
    ("gpu gpus cuda cpu no_cuda", "device"),
    ("amp half mixed_precision", "use_fp16"),
    ("model backbone network net encoder", "arch"),
    ("weights checkpoint ckpt load pretrained init", "pretrained init"),
    ("syncbn", "sync_bn"),
    ("save_freq save_every", "checkpoint_freq"),
    ("print_freq log_every", "log_freq"),
    ("optim opt", "optimizer"),
)
"""what flags are called in other programs, and ours for it, of which a script has some"""
COUNTS = {"nmb", "num", "n", "nb", "number", "of"}
"""parts of names that say nothing of what is counted"""
VALUES = {"gpu": "cuda", "float16": "fp16", "half": "fp16", "bfloat16": "bf16", "cos": "cosine", "adam": "adamw"}
"""of flags, as other programs write them"""


def flags_meant(word: str, names: Collection[str]) -> list[str]:
    """Flags that somebody may have meant by an unknown one, likeliest first, at most three; empty if nothing is near.

    Args:
        word: the unknown flag, without hyphens before it.
        names: flags that there are.
    """
    plain = _joined(word)
    close = [name for name in names if _joined(name) == plain] or _close(word.lower(), names, CLOSE)[:1]
    return close or _elsewhere(word.lower(), names) or _by_parts(word.lower(), names)


def value_meant(word: str, values: Sequence[str]) -> str:
    """The one of some values that somebody may have meant; empty if none is near."""
    other = VALUES.get(word.lower(), "")
    if other in values:
        return other
    by_lower = {value.lower(): value for value in values}
    near = _close(word.lower(), list(by_lower), 0.6)
    return by_lower[near[0]] if near else ""


def _joined(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _close(word: str, names: Collection[str], cutoff: float) -> list[str]:
    return difflib.get_close_matches(word, names, n=3, cutoff=cutoff)


def _elsewhere(word: str, names: Collection[str]) -> list[str]:
    """Flags for what other programs call `word`, numbers of things with or without a word for number."""
    stripped = "_".join(part for part in word.split("_") if part not in COUNTS)
    for theirs, ours in ELSEWHERE:
        known = theirs.split()
        if stripped in known or (len(stripped) > 4 and _close(stripped, known, 0.85)):
            found = [name for name in ours.split() if name in names]
            if found:
                return found[:1]
    return []


def _by_parts(word: str, names: Collection[str]) -> list[str]:
    """Flags that share more than half of the word's parts, those that begin with the first one before others."""
    parts = [part for part in word.split("_") if part not in COUNTS and len(part) > 2]
    scored = []
    for name in names:
        own = name.lower().split("_")
        shared = sum(bool(_close(part, own, 0.8)) for part in parts)
        if 2 * shared > len(parts):
            scored.append((-shared, not _close(parts[0], own[:1], 0.8), len(own), name))
    return [name for *_, name in sorted(scored)][:3]
