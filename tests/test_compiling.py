"""--compile: whole graphs for crops of two sizes, and a word where that fails."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from clusterssl import compiling
from clusterssl.compiling import compile_module, require_compiler, require_cuda_graphs
from clusterssl.dist import World
from clusterssl.errors import UserError
from clusterssl.models.build import build_model
from tests.launch import Launched

CPU = torch.device("cpu")


@pytest.fixture
def fresh() -> None:
    """Nothing compiled yet; skips where there is no compiler."""
    try:
        require_compiler(CPU)
    except UserError as error:
        pytest.skip(str(error))
    torch._dynamo.reset()
    counters.clear()
    compiling._told.clear()


@pytest.mark.slow
def test_crops_of_two_sizes_make_two_whole_graphs(fresh: None, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = build_model("conv4w4", "small", 16, 8, 12).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    compile_module(model.backbone)
    generator = torch.Generator().manual_seed(1)
    crops = [torch.randn(4, 3, side, side, generator=generator) for side in (24, 24, 16)]
    for _ in range(2):
        ours, expected = model.scores(crops)[0], plain.scores(crops)[0]
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
        ours.sum().backward()
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert "graph is broken" not in caplog.text


@pytest.mark.slow
def test_many_shapes_are_all_compiled(fresh: None) -> None:
    module = nn.Sequential(nn.Softplus())
    compile_module(module)
    for rows in range(2, 13):  # torch stops after eight by itself
        x = torch.randn(rows, 3)
        assert torch.allclose(module(x), nn.functional.softplus(x), atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 11


class Broken(nn.Module):
    """Leaves its graph."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x.sin()


def test_a_broken_graph_is_told(fresh: None, caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Sequential(Broken())
    with caplog.at_level(logging.WARNING):
        compile_module(module)
        x = torch.ones(3)
        assert torch.allclose(module(x), x.sin())
    assert "--compile: the graph is broken" in caplog.text


def test_no_compiler_is_said_in_one_line() -> None:
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    try:
        missing = config.patch({"cpp.cxx": ("/nowhere/g++",)})
        with missing, pytest.raises(UserError, match=r"--compile: needs a C\+\+ compiler"):
            require_compiler(CPU)
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.slow
def test_what_cuda_graphs_replay_is_the_same_network(fresh: None) -> None:
    torch.manual_seed(0)
    model = build_model("conv4w4", "small", 16, 8, 12)
    plain = copy.deepcopy(model)
    compile_module(model.backbone, cuda_graphs=True)
    crops = [torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1)) for side in (24, 16)]
    for _ in range(2):
        ours, expected = model.scores(crops)[0], plain.scores(crops)[0]
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
        ours.sum().backward()
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    with torch.no_grad():
        model.scores([torch.randn(3, 3, 20, 20)])
    assert counters["stats"]["unique_graphs"] == 2, "a pass without gradients was compiled"
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    "world, accumulate, message",
    [
        (World(device=CPU), 1, "here a CPU"),
        (World(size=2, device=torch.device("cuda", 0)), 1, "here 2 ranks"),
        (World(device=torch.device("cuda", 0)), 4, "--accumulate 4"),
    ],
)
def test_where_cuda_graphs_cannot_be_used_is_said(world: World, accumulate: int, message: str) -> None:
    with pytest.raises(UserError, match=f"--cuda_graphs: .*{message}"):
        require_cuda_graphs(world, accumulate)


def test_cuda_graphs_are_refused_on_a_cpu_by_the_script(tmp_path: Path) -> None:
    run = Launched("main_swav.py", "--cuda_graphs", "true", "--device", "cpu", "--dump_path", str(tmp_path / "run"))
    codes, screen = run.wait()
    assert codes == [2] and "leave --cuda_graphs out" in screen
