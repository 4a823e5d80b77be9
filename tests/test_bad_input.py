"""Bad input gives one clear line that names the thing and the remedy, exit code 2, and nothing is written over."""

from __future__ import annotations

import os
import pickle
import resource
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import main_swav
from clusterssl import config as cfg
from clusterssl.files import read_checkpoint
from tests.launch import TINY, Launched, metrics


class Ended:
    """How an entry script ended: exit code, output, and the line of the error."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def swav(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs main_swav.py's entry in this process with the tiny flags and those given."""

    def run(*flags: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["main_swav.py", *TINY, "--dump_path", str(tmp_path / "run"), *flags])
        with pytest.raises(SystemExit) as end:
            cfg.entry(main_swav.main)
        captured = capsys.readouterr()
        return Ended(int(end.value.code or 0), captured.out, captured.err)

    return run


def images(folder: Path, count: int, size: int = 24) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (size, size), (number * 7 % 256, 90, 30)).save(folder / f"{number:03}.png")
    return folder


def assert_refused(ended: Ended, *words: str) -> None:
    assert ended.code == 2, ended.out + ended.err
    assert len(ended.err.strip().splitlines()) == 1 and ended.err.startswith("main_swav.py: error: ")
    for word in words:
        assert word in ended.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--data_path /no/such/folder", ["/no/such/folder"]),
        ("--base_lrr 1", ["--base_lrr: unknown flag; did you mean --base_lr?"]),
        ("--nmb_crops 2 6 --size_crops 224", ["--nmb_crops has 2", "--size_crops has 1"]),
        ("--batch_size 4096", ["4096", "96", "--batch_size"]),
        ("--crops_for_assign 0 7", ["--crops_for_assign 0 7", "0 to 2"]),
        ("--queue_length 10 --batch_size 16", ["--queue_length 10", "16"]),
        ("--arch resnet51", ["--arch resnet51", "resnet50"]),
        ("--init /no/file.pth", ["/no/file.pth"]),
        ("--min_scale_crops 0.5 0.5 --max_scale_crops 0.4 1", ["0.5", "0.4", "min <= max"]),
        ("--epochs 0", ["--epochs 0: must be at least 1, such as 100"]),
        ("--nmb_prototypes 1", ["--nmb_prototypes"]),
        ("--epsilon 0", ["--epsilon 0.0: must be above 0, such as 0.05"]),
        ("--epsilon nan", ["--epsilon: 'nan' is not a finite number; write one such as 0.05"]),
        ("--base_lr 0,3", ["--base_lr: '0,3' is not a finite number; write one such as 4.8"]),
        ("--optimizer sdg", ["--optimizer: 'sdg' is none of lars, sgd, adamw; did you mean sgd?"]),
        ("--device gpu", ["--device: 'gpu' is none of auto, cpu, cuda; did you mean cuda?"]),
        ("--amp_dtype float16", ["did you mean fp16?"]),
        ("--size_crops 16 3", ["--size_crops: --arch conv4w4 cannot take crops of 3x3 (it takes 8 and more)"]),
        ("--feat_dim 0", ["--feat_dim 0: must be at least 1, such as 128"]),
        ("--checkpoint_freq -1", ["--checkpoint_freq -1: must be at least 0, such as 25"]),
        ("--epoch_queue_starts -1", ["--epoch_queue_starts -1"]),
        ("--syncbn_process_group_size -1", ["--syncbn_process_group_size -1"]),
        ("--gray_p 2", ["--gray_p 2.0: must be at least 0 and at most 1, such as 0.2"]),
        ("--color_jitter -1", ["--color_jitter -1.0"]),
        ("--klusters 10", ["--klusters: unknown flag; did you mean --nmb_prototypes?"]),
        ("--warmup_epochs -1", ["--warmup_epochs -1"]),
        ("--temperature 0", ["--temperature 0"]),
        ("--base_lr nan", ["--base_lr: 'nan'"]),
        ("--sync_bn appex", ["--sync_bn appex", "apex"]),
        ("--seed 99999999999999999999", ["--seed"]),
        ("--crops_for_assign 0 0", ["--crops_for_assign 0 0", "once"]),
        ("--epochs two", ["'two' is not a whole number"]),
        ("--nmb_crops 1 0", ["--nmb_crops 1 0: must be at least 1"]),
    ],
)
def test_flags_that_cannot_work(swav, tmp_path: Path, flags: str, words: list[str]) -> None:
    assert_refused(swav(*flags.split()), *words)
    assert not (tmp_path / "run").exists(), "nothing is written before all flags have proved good"


def test_folders_without_images(swav, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(swav("--data_path", str(tmp_path / "empty")), str(tmp_path / "empty"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    assert_refused(swav("--data_path", str(tmp_path / "texts")), str(tmp_path / "texts"), "png")


def test_a_queue_that_is_not_divisible_says_what_is_used(swav) -> None:
    ended = swav("--queue_length", "40", "--batch_size", "16", "--epochs", "1")
    assert ended.code == 0 and "--queue_length 40" in ended.out and "using 32" in ended.out


def test_a_folder_of_another_run_is_refused_and_untouched(swav, tmp_path: Path) -> None:
    assert swav("--batch_size", "16", "--epochs", "1").code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert_refused(swav("--batch_size", "16", "--epochs", "1", "--feat_dim", "4"), "feat_dim was 8 and is now 4")
    assert_refused(swav("--batch_size", "32", "--epochs", "1"), "global_batch was 16 and is now 32")
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace('"method": "swav"', '"method": "sela"'))
    assert_refused(swav("--batch_size", "16", "--epochs", "1"), "a run of sela, not swav")
    before[record] = record.read_bytes()
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


class Malicious:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/clusterssl-was-here",)


@pytest.mark.parametrize("kind", ["not finite", "truncated", "foreign", "malicious", "empty", "list"])
def test_bad_checkpoints_are_refused_and_never_run(swav, tmp_path: Path, kind: str) -> None:
    path, trace = tmp_path / "weights.pth", Path("/tmp/clusterssl-was-here")
    trace.unlink(missing_ok=True)
    torch.save({"state_dict": {"module.conv1.weight": torch.zeros(100, 100)}}, path)
    if kind == "not finite":
        torch.save({"state_dict": {"module.conv1.weight": torch.full((4, 3, 3, 3), torch.nan)}}, path)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:10000])
    elif kind == "foreign":
        path.write_text("checkpoints are not here any more\n")  # pickle knows "c" as an instruction
    elif kind == "malicious":
        path.write_bytes(pickle.dumps({"state_dict": Malicious()}))
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        torch.save([1, 2], path)
    assert_refused(swav("--init", str(path)), str(path), *(["a text file"] if kind == "foreign" else []))
    assert not trace.exists() and not (tmp_path / "run").exists()


def test_a_record_of_another_program_is_refused(swav, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert_refused(swav(), "run.json", "another program", "--dump_path")


def test_a_run_shorter_than_the_warm_up_says_what_it_does(swav) -> None:
    ended = swav("--batch_size", "16", "--epochs", "1", "--warmup_epochs", "10")
    assert ended.code == 0 and "--warmup_epochs 10: as long as the run or longer, using a tenth of it" in ended.out


def test_a_malicious_checkpoint_in_the_run_folder_is_refused(swav, tmp_path: Path) -> None:
    assert swav("--batch_size", "16", "--epochs", "1").code == 0
    trace = Path("/tmp/clusterssl-was-here")
    trace.unlink(missing_ok=True)
    for name in ("checkpoint.pth.tar", "checkpoint.previous.pth.tar"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
        torch.save({"step": 1, "shards": 0, "state_dict": Malicious()}, tmp_path / "run" / name)
    assert_refused(swav("--batch_size", "16", "--epochs", "2"), "checkpoint.pth.tar", "refused", "system")
    assert not trace.exists()


def test_a_checkpoint_of_another_program_is_not_taken_for_a_run(swav, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "run" / "checkpoint.pth.tar")
    assert_refused(swav(), "no run.json", "--init")


def test_unreadable_images_are_replaced_counted_and_listed(swav, tmp_path: Path) -> None:
    folder = images(tmp_path / "images", 60)
    (folder / "005.png").write_bytes(b"")
    (folder / "011.png").write_bytes((folder / "012.png").read_bytes()[:40])
    ended = swav("--data_path", str(folder), "--batch_size", "16", "--max_bad_fraction", "0.1")
    assert ended.code == 0
    listed = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert sorted(Path(line.split("\t")[0]).name for line in listed) == ["005.png", "011.png"]
    assert [r["bad_images"] for r in metrics(tmp_path / "run") if "step" in r][-1] == 2


def test_too_many_unreadable_images_stop_the_run(swav, tmp_path: Path) -> None:
    folder = images(tmp_path / "images", 60)
    for number in range(0, 60, 5):
        (folder / f"{number:03}.png").write_text("no image")
    ended = swav("--data_path", str(folder), "--batch_size", "16", "--max_bad_fraction", "0.05")
    assert_refused(ended, "images cannot be read", "bad_images.txt", "--max_bad_fraction")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_good_checkpoint(swav, tmp_path: Path) -> None:
    assert swav("--batch_size", "16", "--epochs", "1", "--optimizer", "sgd").code == 0
    good = (tmp_path / "run" / "checkpoint.pth.tar").read_bytes()
    ended = swav(
        "--batch_size", "16", "--epochs", "2", "--optimizer", "sgd", "--base_lr", "1e38", "--warmup_epochs", "0"
    )
    assert_refused(ended, "not finite", "step", "--base_lr")
    assert (tmp_path / "run" / "checkpoint.pth.tar").read_bytes() == good
    assert read_checkpoint(tmp_path / "run" / "checkpoint.pth.tar")["step"] == 6


def test_a_full_disk_leaves_the_old_checkpoint(swav, tmp_path: Path) -> None:
    """The kernel refuses to let a file grow past a limit, as a full disk does."""
    assert swav("--batch_size", "16", "--epochs", "1").code == 0
    good = (tmp_path / "run" / "checkpoint.pth.tar").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, hard))
    try:
        ended = swav("--batch_size", "16", "--epochs", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_refused(ended, "could not be written", "intact", "free some space")
    assert (tmp_path / "run" / "checkpoint.pth.tar").read_bytes() == good
    assert not list((tmp_path / "run").glob(".*.tmp")), "no leftovers"
    assert swav("--batch_size", "16", "--epochs", "2").code == 0


def test_a_folder_that_cannot_be_written(swav) -> None:
    ended = swav("--dump_path", "/proc/nowhere/run")
    assert_refused(ended, "--dump_path /proc/nowhere/run", "cannot be written")


def test_a_problem_of_one_rank_ends_all_ranks(tmp_path: Path) -> None:
    flags = [*TINY, "--batch_size", "16", "--epochs", "1", "--dump_path", str(tmp_path), "--feat_dim", "8"]
    codes, printed = Launched("main_swav.py", *flags, ranks=2).wait()
    assert codes == [0, 0], printed
    codes, printed = Launched("main_swav.py", *flags, "--feat_dim", "4", ranks=2).wait()
    assert codes == [2, 2] and "feat_dim was 8 and is now 4" in printed


def test_a_rank_that_cannot_load_ends_all_ranks(tmp_path: Path) -> None:
    """The broken images lie in one rank's share of a step only; the other rank must not wait for ever."""
    folder = images(tmp_path / "images", 64)
    (folder / "000.png").write_text("no image")
    flags = [*TINY, "--data_path", str(folder), "--batch_size", "8", "--max_bad_fraction", "0.001"]
    codes, printed = Launched("main_swav.py", *flags, "--dump_path", str(tmp_path / "run"), ranks=2).wait(120)
    assert codes == [2, 2] and "images cannot be read" in printed, printed
