"""What is written in Triton: by its interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from clusterssl.cluster.nearest import Target, search_torch
from clusterssl.cluster.sinkhorn import sinkhorn
from tests.cluster.test_sinkhorn import cosines, reference
from tests.launch import ROOT


@pytest.mark.parametrize("name", ["cluster/interpreted_nearest", "cluster/interpreted_sinkhorn", "interpreted_lars"])
def test_by_the_interpreter(name: str) -> None:
    version = tuple(map(int, pytest.importorskip("triton").__version__.split(".")[:2]))  # comes with PyTorch for CUDA
    if version < (3, 7) and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("this Triton's interpreter needs a numpy before 2.4")
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/{name}.py"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"(\d+) passed", done.stdout) and "skipped" not in done.stdout


@pytest.mark.parametrize("capability", [80, 86, 90])
def test_compiles_for_gpus_that_are_not_here(capability: int) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from clusterssl import lars_kernel
    from clusterssl.cluster import nearest_kernel, sinkhorn_kernels

    tile = {name: getattr(nearest_kernel, name) for name in ("ROWS", "CENTROIDS", "DIMENSIONS")}
    cases = [(nearest_kernel._search, {"D": 128, "OFFSETS": offsets, **tile}) for offsets in (False, True)]
    passes = (sinkhorn_kernels._start, sinkhorn_kernels._sweep, sinkhorn_kernels._finish)
    cases += [(kernel, {"K": k, "COLUMNS": n}) for kernel in passes for k, n in ((1, 1), (3000, 4096), (2**14, 2**14))]
    cases.append((lars_kernel._update, {"PART": lars_kernel._PART}))
    for kernel, constants in cases:
        types = {name: "constexpr" if name in constants else type_of(name) for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        options = {"num_warps": 8, "enable_fp_fusion": True}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.metadata.shared <= 96 * 1024, "a multiprocessor has no more"
        assert "st.local" not in made.asm["ptx"], "the compiler keeps an array out of registers"


def type_of(argument: str) -> str:
    """Triton's word for the type of a kernel's argument, by its name."""
    if argument.startswith(("label_", "address_", "size_", "tensor_", "start_")):
        return "*i64"
    if "_" in argument:
        return "*fp32"
    return "fp32" if argument in ("shift", "scale", "tiny", "momentum", "lr") else "i32"


@pytest.mark.gpu
@pytest.mark.parametrize("rows, clusters, dim", [(1000, 257, 128), (70_000, 3000, 128), (5000, 1000, 2048)])
@pytest.mark.parametrize("euclidean", [False, True])
def test_nearest_on_a_gpu(rows: int, clusters: int, dim: int, euclidean: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(rows)
    x_ND, c_KD = (torch.randn(n, dim, generator=generator, device="cuda") for n in (rows, clusters))
    offset_K = c_KD.square().sum(1) / 2 if euclidean else None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    labels_N = torch.cat([labels for _, labels, _ in search_torch(x_ND, Target(c_KD, None, offset_K))])
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 3 * x_ND.nbytes + c_KD.nbytes + 100 * rows + 2**20, "scores were written"
    exact_NK = x_ND.double() @ c_KD.double().T - (0 if offset_K is None else offset_K.double())
    mine_N = exact_NK.gather(1, labels_N[:, None])[:, 0]
    assert float((exact_NK.amax(1) - mine_N).max()) <= 2e-5 * dim**0.5


@pytest.mark.gpu
@pytest.mark.parametrize("rows, prototypes", [(1, 5), (512, 3000), (4096, 3000), (300, 10_000), (64, 20_000)])
def test_sinkhorn_on_a_gpu(rows: int, prototypes: int) -> None:
    scores = cosines(rows, prototypes)
    plan = sinkhorn(scores.cuda(), 0.05, 3, bound=1.0).cpu()
    np.testing.assert_allclose(plan.numpy(), reference(scores.numpy(), 0.05, 3), rtol=0, atol=2e-6)
