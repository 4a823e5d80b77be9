"""Plans say what real trainings then hold, send and write."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch.distributed as torch_dist

from clusterssl import config as cfg
from clusterssl.errors import UserError
from clusterssl.plan import __main__ as command
from clusterssl.plan.blueprint import read_script
from clusterssl.plan.measured import fitting
from clusterssl.plan.network import Network, shares
from clusterssl.plan.rehearsal import rehearse
from clusterssl.plan.summary import Plan
from clusterssl.plan.watch import Message
from tests.launch import ROOT
from tests.plan.real import on_two_ranks, peak_of_a_step
from tests.ranks import run_ranks

IMAGES = 96
SHARED = [
    *("--data_path", f"synthetic:{IMAGES}:24x24", "--arch", "conv4w16", "--epochs", "1", "--batch_size", "8"),
    *("--workers", "0", "--log_freq", "100", "--device", "cpu", "--checkpoint_freq", "0"),
]
VIEWS = [
    *("--nmb_crops", "2", "1", "--size_crops", "16", "12", "--min_scale_crops", "0.4", "0.2"),
    *("--max_scale_crops", "1", "0.5", "--hidden_mlp", "64", "--feat_dim", "32"),
]
METHODS = {
    "swav": ("main_swav.py", [*VIEWS, "--nmb_prototypes", "40", "--queue_length", "32", "--epoch_queue_starts", "0"]),
    "swav alone": ("main_swav.py", [*VIEWS, "--nmb_prototypes", "40", "--sync_bn", "none", "--optimizer", "adamw"]),
    "deepclusterv2": ("main_deepclusterv2.py", [*VIEWS, "--nmb_prototypes", "40", "30"]),
    "sela": ("main_sela.py", [*VIEWS, "--nmb_prototypes", "40", "30", "--freeze_prototypes_niters", "0"]),
    "sela_v1": ("main_sela.py", ["--version", "1", "--size_crops", "16", "--hc", "2", "--ncl", "40", "--nopts", "1"]),
    "deepcluster": ("main_deepcluster.py", ["--size_crops", "16", "--nmb_cluster", "40", "--reassign", "1.0"]),
    "selfclassifier": ("main_selfclassifier.py", [*VIEWS, "--cls_size", "40", "30", "--queue_len", "32"]),
}


def planned(name: str, ranks: int, *more: str, images: int = IMAGES) -> Plan:
    script, flags = METHODS[name]
    options = cfg.parse(command.Options, ["--nodes", str(ranks), "--ngpus", "0", "--num_images", str(images)])
    return command.plan(options, ROOT / script, [*SHARED, *flags, *more])


@pytest.mark.parametrize("name", METHODS)
def test_bytes_are_those_of_two_real_ranks(name: str, tmp_path: Path) -> None:
    script, flags = METHODS[name]
    plan = planned(name, 2)
    real = run_ranks(on_two_ranks, 2, script, [*SHARED, *flags], str(tmp_path))[0]
    messages = plan.rehearsed.messages
    for kind in ("all-reduce", "all-gather", "broadcast"):
        ours = [message for message in messages if message.kind == kind]
        assert sum(message.nbytes for message in ours) == real["bytes"].get(kind, 0), (kind, messages, real)
        assert len(ours) == real["calls"].get(kind, 0), (kind, messages, real)
    assert plan.rehearsed.memory["parameters"] == real["parameters"]
    assert plan.rehearsed.memory["optimiser"] == real["optimiser"]
    shared, *own = plan.rehearsed.files.values()
    assert shared == pytest.approx(real["files"].pop("checkpoint.pth.tar"), rel=0.01)
    assert len(real["files"]) == 2 * len(own)
    for size in real["files"].values():  # whose records begin at multiples of 64 bytes
        assert size == pytest.approx(own[0], rel=0.01, abs=256)


def test_embeddings_for_the_queue_are_one_message_that_nothing_waits_for() -> None:
    sent = planned("selfclassifier", 2).rehearsed.messages
    assert [message.kind for message in sent if not message.waited] == ["all-gather"]
    assert [message.waited for message in sent if message.part == "neighbour_queue"] == [False]


@pytest.mark.parametrize("name", METHODS)
def test_peak_of_a_step_is_that_of_a_real_one(name: str, tmp_path: Path) -> None:
    script, flags = METHODS[name]
    plan = planned(name, 1, "--batch_size", "16")
    lasting = sum(nbytes for part, nbytes in plan.rehearsed.memory.items() if part != "gradients")
    measured = run_ranks(peak_of_a_step, 1, script, [*SHARED, *flags, "--batch_size", "16"], str(tmp_path))[0]
    assert 1 / 1.2 < (plan.rehearsed.peak - lasting) / measured < 1.2


def test_leaves_the_process_as_it_was() -> None:
    before = list(sys.argv), dict(os.environ)
    planned("swav", 4)
    assert (list(sys.argv), dict(os.environ)) == before and not torch_dist.is_initialized()


def test_time_of_messages() -> None:
    network = Network(bandwidth_gbps=80, latency_us=10)  # 10 bytes a nanosecond
    reduce, gather, spread = (Message("x", kind, 10**9) for kind in ("all-reduce", "all-gather", "broadcast"))
    assert network.seconds(reduce, 4) == pytest.approx(2 * 3 / 4 * 0.1 + 2 * 2 * 10e-6)
    assert network.seconds(gather, 4) == pytest.approx(3 * 0.1 + 2 * 10e-6)
    assert network.seconds(spread, 4) == pytest.approx(0.1 + 2 * 10e-6)
    assert network.seconds(reduce._replace(ranks=2), 4) == pytest.approx(0.1 + 2 * 10e-6)
    assert network.seconds(reduce, 1) == 0
    in_nodes = Network(bandwidth_gbps=80, latency_us=10, per_node=4, local_latency_us=1)
    small = Message("x", "all-reduce", 0)
    assert in_nodes.seconds(small, 16) == pytest.approx(2 * (3 * 1e-6 + 2 * 10e-6))  # three ranks down, two nodes up
    assert in_nodes.seconds(small._replace(kind="broadcast"), 16) == pytest.approx(3 * 1e-6 + 2 * 10e-6)
    assert in_nodes.seconds(small._replace(ranks=4), 16) == pytest.approx(2 * 3 * 1e-6)  # a group within a node
    later = shares([gather, gather._replace(waited=False)], 4, network)
    assert sorted((share.calls, share.waited) for share in later) == [(1, False), (1, True)]
    together = shares([reduce, reduce, gather._replace(part="gradients")], 4, network)
    assert [(share.calls, share.own) for share in together] == [(2, True), (1, False)][:: 1 if together[0].own else -1]


def shown(words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["clusterssl.plan", *words.split()])
    with pytest.raises(SystemExit) as end:
        cfg.entry(command.main)
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


GPU = "--nodes 2 --ngpus 4 --num_images 1000 main_swav.py --data_path x --arch conv4w4 --size_crops 32 --batch_size 16"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (f"--gpu_memory_gb 0.001 {GPU}", "there are --gpu_memory_gb 0.001: lower --batch_size"),
        (f"--global_batch 100 {GPU}", "--global_batch 100: cannot be divided among 8 ranks x 1"),
        (f"--global_batch 256 {GPU}", "--global_batch 256: these flags make 128; give --batch_size 32"),
        (f"{GPU} --batch_size 126", "a global batch of 1008 images"),
        (f"{GPU} --queue_length 100", "--queue_length 100: shorter than a step of 128 images"),
        (f"{GPU} --size_crops 224 96", "the four lists need one value per resolution"),
        (f"{GPU} --sync_bn apex --syncbn_process_group_size 3", "3 does not divide the 8 processes"),
        ("--num_images 0 main_swav.py --data_path nowhere", "nowhere"),
        ("eval_knn.py", "only pretraining can be planned"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    words: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = shown(words, capsys, monkeypatch)
    assert code == 2 and said in err and len(err.strip().splitlines()) == 1, err


def test_the_table_names_what_was_measured_and_what_was_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"arch": "conv4w4", "nmb_crops": [2], "size_crops": [32], "batch_size": 8}
    record = {
        "hardware": {"cpu": "C", "gpu": "G1"},
        "result": {"options": options, "steps": {"ours": {"images_per_s": 250.0}, "bare": {"images_per_s": 9.0}}},
    }
    (tmp_path / "one.json").write_text(json.dumps(record))
    (tmp_path / "torn.json").write_text("{")
    code, out, _ = shown(f"--results {tmp_path} {GPU} --epochs 10", capsys, monkeypatch)
    assert code == 0 and "one.json, steps of 8 images without loading on G1: 250 images/s and rank" in out
    assert f"{2000}, {7 * 128 * 10 / 2000 / 3600:.2g} h" in out, "7 steps of 128 images, 10 epochs, 8 ranks"
    for other in ("--arch conv4w8", "--size_crops 16", "--device cpu"):
        _, out, _ = shown(f"--results {tmp_path} {GPU} {other}", capsys, monkeypatch)
        assert "no figure in bench/results is of such a training" in out


def test_whole_runs_are_measured_by_the_core() -> None:
    """Of the results that are here: SwAV on CIFAR-10, by its command there."""
    results = ROOT / "bench" / "results"
    found = json.loads((results / "methods_cifar10-epyc2.json").read_text())["result"]
    words = found["commands"]["SwAV"].split()[2:]
    speeds = fitting(read_script(ROOT / "main_swav.py", words, 1, 1), results, ROOT, gpu=False)
    rate = found["means"]["SwAV"]["crops_per_s"] / 2
    assert rate in [speed.images_per_s for speed in speeds if speed.source.startswith("methods_cifar10-epyc2.json")]


def test_published_words_are_read_as_the_script_reads_them() -> None:
    """-b counts images of a node, and version 1 of SeLa has flags of its own."""
    blueprint = read_script(ROOT / "main_selfclassifier.py", ["imagenet", "-b", "64"], 2, 4)
    assert blueprint.config.optim.batch_size == 16
    assert read_script(ROOT / "main_sela.py", ["--version", "1"], 1, 1).name == "sela"
    with pytest.raises(UserError, match="--nmb_crop: unknown flag; did you mean --nmb_crops"):
        read_script(ROOT / "main_swav.py", ["--nmb_crop", "2"], 1, 1)


@pytest.mark.parametrize("name", METHODS)
def test_messages_of_a_rank_do_not_depend_on_the_number_of_ranks(name: str) -> None:
    script, flags = METHODS[name]
    longer = {"swav": "--queue_length", "selfclassifier": "--queue_len"}.get(name, "--seed")
    blueprint = read_script(ROOT / script, [*SHARED, *flags, longer, "128"], 1, 1)
    few, many = (rehearse(blueprint, 4000, ranks, gpu=True).messages for ranks in (2, 8))
    assert few == many and len(few) > 3


def test_groups_of_batchnorm_share_among_themselves() -> None:
    words = [*SHARED[:-4], *METHODS["swav"][1], "--data_path", "x", "--sync_bn", "apex", "--queue_length", "0"]
    messages = rehearse(read_script(ROOT / "main_swav.py", words, 2, 8), 1000, 16, gpu=True).messages
    assert {message.ranks for message in messages if message.part == "batchnorm"} == {8}


def test_our_flags_may_stand_anywhere_and_counted_images_are_not_the_digits() -> None:
    ours, theirs = command.split(["--nodes", "2", "main_swav.py", "--epochs", "5", "--ngpus=4", "--num_images", "9"])
    assert ours == ["--nodes", "2", "--ngpus=4", "--num_images", "9"]
    assert theirs == ["main_swav.py", "--epochs", "5", "--data_path", "images"]
    assert command.split(["--ngpus", "1", "--epochs", "5"]) == (["--ngpus", "1"], ["main_swav.py", "--epochs", "5"])
    assert command.split(["--num_images", "9", "main_sela.py", "--data_path=x"])[1] == ["main_sela.py", "--data_path=x"]
