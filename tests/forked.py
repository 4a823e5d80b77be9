"""Processes that begin with their imports done: forked from a server that has them."""

from __future__ import annotations

import functools
import os
import runpy
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path
from signal import Signals
from threading import Thread
from typing import Any

import torch
import torch.multiprocessing as mp


@functools.cache
def server() -> Any:
    """Multiprocessing context whose processes need a moment to begin, where importing PyTorch takes seconds."""
    context, before = mp.get_context("forkserver"), os.environ.get("PYTHONPATH")
    context.set_forkserver_preload(["sklearn.metrics", "clusterssl.pretrain"])
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    forkserver.ensure_running()
    del os.environ["PYTHONPATH"]
    os.environ.update({"PYTHONPATH": before} if before else {})
    return context


class Script:
    """A script in a process of its own, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        self.words, self.texts = words, ["", ""]
        pipes = [server().Pipe(duplex=False) for _ in self.texts]
        self._process = server().Process(target=_run, args=(words, env, *(end for _, end in pipes)))
        self._process.start()
        self.pid: int = self._process.pid
        for _, end in pipes:
            end.close()
        self._readers = [Thread(target=self._read, args=(i, end), daemon=True) for i, (end, _) in enumerate(pipes)]
        for reader in self._readers:
            reader.start()

    def _read(self, number: int, end: Any) -> None:
        with end, os.fdopen(os.dup(end.fileno()), encoding="utf-8") as lines:
            for line in lines:
                self.texts[number] += line

    def poll(self) -> int | None:
        """Exit code, negative after a signal; None while it runs."""
        return self._process.exitcode

    @property
    def returncode(self) -> int:
        """As `poll`, after the end."""
        code = self.poll()
        assert code is not None, "it still runs"
        return code

    def send_signal(self, number: Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end; what was printed on stdout and stderr."""
        self._process.join(timeout)
        if self.poll() is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(self.words, timeout, *self.texts)
        for reader in self._readers:
            reader.join(60)
        return self.texts[0], self.texts[1]


def _run(words: list[str], env: dict[str, str], *ends: Any) -> None:
    for number, end in enumerate(ends, start=1):
        os.dup2(end.fileno(), number)
        end.close()
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")
