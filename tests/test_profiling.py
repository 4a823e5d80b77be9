"""--profile: its table agrees with the trace, and it changes nothing that is learned."""

from __future__ import annotations

import gzip
import json
import re
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from clusterssl.dist import World
from clusterssl.files import read_checkpoint
from clusterssl.profiling import PARTS, WARM_UP, Mark, Profile, shares
from tests.launch import TINY, Launched, wait_for_step

QUEUE = ["--queue_length", "32", "--epoch_queue_starts", "1", "--batch_size"]
STEPS = 24


def trained(folder: Path, *flags: str, ranks: int = 1, accumulate: int = 1) -> str:
    words = [*TINY, *QUEUE, str(16 // ranks // accumulate), "--accumulate", str(accumulate), "--dump_path", str(folder)]
    codes, printed = Launched("main_swav.py", *words, *flags, ranks=ranks).wait()
    assert codes == [0] * ranks, printed
    return printed


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = read_checkpoint(folder / "checkpoint.pth.tar")
    assert state["step"] == STEPS
    return state["state_dict"]


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trace(folder: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress((folder / "profile" / "trace.json.gz").read_bytes()))["traceEvents"]


def table(text: str) -> dict[str, tuple[float, float]]:
    """Milliseconds a step and per cent by the words of each part."""
    rows = re.findall(r"^(\S.*?) +(\d+\.\d+) +(\d+\.\d+)$", text, flags=re.M)
    return {words: (float(ms), float(share)) for words, ms, share in rows if words in {*PARTS.values(), "together"}}


def total_ms(events: list[dict[str, Any]], name: str) -> float:
    return sum(e["dur"] for e in events if e.get("cat") == "user_annotation" and e["name"] == name) / 1e3


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_the_table_agrees_with_the_trace_and_the_weights_with_those_without(
    ranks: int, accumulate: int, tmp_path: Path
) -> None:
    trained(tmp_path / "plain", ranks=ranks, accumulate=accumulate)
    printed = trained(tmp_path / "profiled", "--profile", "9", ranks=ranks, accumulate=accumulate)
    assert same(tmp_path / "plain", tmp_path / "profiled")
    assert not (tmp_path / "plain" / "profile").exists()
    text = (tmp_path / "profiled" / "profile" / "steps.txt").read_text()
    assert text.strip() in printed and printed.count("part of a step") == 1
    rows = table(text)
    assert set(rows) == {*PARTS.values(), "together"}
    assert sum(share for words, (_, share) in rows.items() if words != "together") == pytest.approx(100, abs=0.5)
    events = trace(tmp_path / "profiled")
    measured = {words: total_ms(events, words) / 9 for words in PARTS.values()}
    spans = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("ProfilerStep")]
    whole = sum(e["dur"] for e in spans) / 1e3 / 9
    assert rows["together"][0] == pytest.approx(whole, rel=0.1, abs=0.5)
    for name in ("data", "copy", "augmentation", "forward", "backward", "optimiser"):
        assert rows[PARTS[name]][0] == pytest.approx(measured[PARTS[name]], abs=0.1 * whole), name
    if accumulate == 1:  # else part of the copies and the augmentation are inside, too
        own = measured[PARTS["assignment"]] - measured[PARTS["forward"]]
        assert rows[PARTS["assignment"]][0] == pytest.approx(own, abs=0.1 * whole)
    assert len(re.findall(r"^aten::\S+ +\d", text, flags=re.M)) >= 5


class At(NamedTuple):
    """Stands for an event of a GPU's stream."""

    ms: float

    def elapsed_time(self, later: At) -> float:
        return later.ms - self.ms


def test_each_stretch_of_time_counts_for_the_part_that_ended_it() -> None:
    marks = [Mark("other", 0.0, At(5)), Mark("other", 1.0, At(7)), Mark("assignment", 3.0, At(8)),
             Mark("forward", 7.0, At(48)), Mark("assignment", 7.5, At(50)), Mark("other", 8.0, At(51))]  # fmt: skip
    host, device = shares(marks)
    assert host == {"other": 1.5, "assignment": 2.5, "forward": 4.0}
    assert device == pytest.approx({"other": 0.003, "assignment": 0.003, "forward": 0.04})
    assert shares([mark._replace(device=None) for mark in marks]) == (host, {})


def test_stopped_while_profiling_it_ends_and_resumes_with_the_same_weights(tmp_path: Path) -> None:
    trained(tmp_path / "whole")
    for attempt in range(5):  # a fast run may end before the signal arrives
        folder = tmp_path / f"stopped{attempt}"
        words = [*TINY, *QUEUE, "16", "--dump_path", str(folder), "--profile", "1000"]
        launched = Launched("main_swav.py", *words)
        wait_for_step(folder, WARM_UP + 4, launched)
        launched.send(signal.SIGTERM)
        codes, printed = launched.wait()
        if codes == [75]:
            break
    assert codes == [75] and "part of a step" not in printed, printed
    assert not (folder / "profile").exists()
    trained(folder, "--profile", "2")
    assert same(tmp_path / "whole", folder) and (folder / "profile" / "steps.txt").exists()


def test_a_run_that_ends_earlier_tells_of_the_steps_there_were(tmp_path: Path) -> None:
    printed = trained(tmp_path / "some", "--profile", "1000")
    assert f"--profile: {STEPS - WARM_UP - 1} steps, up to step {STEPS}" in printed
    again = trained(tmp_path / "some", "--profile", "3")
    assert "nothing to do" in again and "the run ended before its first" in again


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    printed = trained(tmp_path / "run", "--profile", "3")
    assert "could not be written" in printed and "part of a step" in printed


def test_other_ranks_and_runs_without_the_flag_take_no_times(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    for world, steps in ((World(rank=1, size=2), 5), (World(), 0)):
        profile = Profile(steps, tmp_path, world, model)
        for _ in range(3 * WARM_UP):
            with profile.part("data"), profile.part("copy"):
                model(torch.zeros(1, 2))
            profile.step()
        profile.finish()
        assert not model._forward_hooks and not list(tmp_path.iterdir())
        assert profile.part("data") is profile.part("copy")
