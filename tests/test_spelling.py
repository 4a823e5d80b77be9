"""A suggestion is sensible or absent; the table was written by hand from what users of other programs type."""

from __future__ import annotations

import pytest

import assign
import eval_linear
import main_deepcluster
import main_deepclusterv2
import main_selfclassifier
import main_swav
from clusterssl import config as cfg
from clusterssl.errors import UserError
from clusterssl.spelling import flags_meant, value_meant

SCRIPTS = {
    "swav": main_swav, "deepclusterv2": main_deepclusterv2, "deepcluster": main_deepcluster,
    "selfclassifier": main_selfclassifier, "linear": eval_linear, "assign": assign,
}  # fmt: skip


@pytest.mark.parametrize(
    ("script", "word", "meant"),
    [
        ("swav", "klusters", "nmb_prototypes"),
        ("swav", "clusters", "nmb_prototypes"),
        ("swav", "k", "nmb_prototypes"),
        ("swav", "num_clusters", "nmb_prototypes"),
        ("swav", "prototypes", "nmb_prototypes"),
        ("deepclusterv2", "klusters", "nmb_prototypes"),
        ("deepcluster", "klusters", "nmb_cluster"),
        ("deepcluster", "nmb_clusters", "nmb_cluster"),
        ("selfclassifier", "klasses", "cls_size"),
        ("assign", "klusters", "k"),
        ("assign", "nmb_clusters", "k"),
        ("swav", "lr", "base_lr"),
        ("linear", "learning_rate", "lr"),
        ("swav", "learning_rate", "base_lr"),
        ("swav", "BatchSize", "batch_size"),
        ("swav", "bs", "batch_size"),
        ("swav", "epoch", "epochs"),
        ("swav", "base_lrr", "base_lr"),
        ("swav", "num_workers", "workers"),
        ("swav", "output_dir", "dump_path"),
        ("assign", "output", "out"),
        ("assign", "crop_size", "image_size"),
        ("assign", "duplicates", "duplicate_similarity"),
        ("assign", "outliers", "outlier_spread"),
        ("assign", "link", "links"),
        ("deepclusterv2", "nmb_kmeans_iters", "kmeans_iters"),
        ("swav", "gpu", "device"),
        ("swav", "mlp", "hidden_mlp"),
        ("swav", "fp16", "use_fp16"),
        ("swav", "crops", "nmb_crops size_crops crops_for_assign"),
        ("swav", "size", "size_crops batch_size"),
        *[("swav", word, "") for word in ("zzz", "verbose", "v", "nmb_heads", "xyz_path_of_it", "q")],
        *[("assign", word, "") for word in ("head", "gallery")],
        *[("linear", word, "") for word in ("klusters", "temperature", "checkpoint_key")],
    ],
)
def test_unknown_flags(script: str, word: str, meant: str) -> None:
    with pytest.raises(UserError) as caught:
        cfg.parse(SCRIPTS[script].Config, [f"--{word}", "1"])
    said = str(caught.value)
    assert said.startswith(f"--{word}: unknown flag; ") and "\n" not in said
    suggested = [part.strip("?,") for part in said.split() if part.startswith("--") and part != f"--{word}:"]
    assert set(suggested) >= {f"--{one}" for one in meant.split()} if meant else suggested == ["--help"], said
    assert not {"--world_size", "--rank", "--local_rank"} & set(suggested), "those do nothing"
    known = {flag.name for flag in cfg.flags(SCRIPTS[script].Config())} | {"help"}
    assert {one[2:] for one in suggested} <= known


def test_every_slip_in_a_long_name_finds_it_back() -> None:
    """Two letters swapped, one left out, one doubled, at each place of each flag of six letters or more."""
    names = [flag.name for flag in cfg.flags(main_swav.Config())]
    for name in (name for name in names if len(name) >= 6):
        for at in range(len(name) - 1):
            for slip in (
                name[:at] + name[at + 1] + name[at] + name[at + 2 :], name[:at] + name[at + 1 :],
                name[:at] + name[at] + name[at:],
            ):  # fmt: skip
                assert slip in names or name in flags_meant(slip, names), slip


def test_values() -> None:
    assert value_meant("Kmean", ["Kmeans", "PIC"]) == "Kmeans"
    assert value_meant("pic", ["Kmeans", "PIC"]) == "PIC"
    assert value_meant("gpu", ["auto", "cpu", "cuda"]) == "cuda"
    assert value_meant("gpu", ["cpu", "gpu2"]) == "gpu2"
    assert value_meant("zzz", ["Kmeans", "PIC"]) == ""
