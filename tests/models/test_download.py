"""Downloads into torch's cache, from a local HTTP server."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from clusterssl.errors import UserError
from clusterssl.models.build import build_model
from clusterssl.models.download import cache_path, fetch, is_url
from clusterssl.models.weights import flat_state_dict, init_model, published_state_dict, read_weights
from tests.models.server import serve


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str, list[str]]]:
    folder = tmp_path / "site"
    folder.mkdir()
    with serve(folder) as (url, requested):
        yield folder, url, requested


def names(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def test_addresses_and_paths() -> None:
    assert is_url("https://example.org/a.pth") and is_url("file:///a.pth")
    assert not is_url("/a/b.pth") and not is_url("C:\\a.pth") and not is_url("a:b.pth")


def test_published_files_share_the_cache_of_torch_hub(cache: Path) -> None:
    url = "https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar"
    assert cache_path(url) == cache / "swav_800ep_pretrain.pth.tar"
    a, b = cache_path("http://a.org/x/checkpoint.pth.tar"), cache_path("http://a.org/y/checkpoint.pth.tar?v=1")
    assert a != b and a.name.endswith("_checkpoint.pth.tar") and b.name.endswith("_checkpoint.pth.tar")
    assert cache_path("http://a.org/%2e%2e%2f%2e%2e%2fetc").parent == cache
    assert cache_path("http://a.org/").parent == cache


def test_weights_from_an_address_are_downloaded_once(cache: Path, site: tuple[Path, str, list[str]]) -> None:
    folder, url, requested = site
    model = build_model("conv4w8", "small", 12, 6, 5)
    torch.save(published_state_dict(model), folder / "w.pth.tar")
    for _ in range(2):
        state, _ = read_weights(f"{url}/w.pth.tar")
        assert all(torch.equal(state[name], tensor) for name, tensor in flat_state_dict(model).items())
    other = build_model("conv4w8", "small", 12, 6, 5)
    assert init_model(other, f"{url}/w.pth.tar") == []
    assert torch.equal(other.prototypes.weight, model.prototypes.weight)
    assert requested == ["/w.pth.tar"] and names(cache) == [cache_path(f"{url}/w.pth.tar").name]


def test_parallel_processes_download_once(cache: Path, site: tuple[Path, str, list[str]]) -> None:
    folder, url, requested = site
    (folder / "w.bin").write_bytes(b"x" * 3_000_000)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(fetch, [f"{url}/w.bin"] * 4))
    assert len(requested) == 1 and sum(fresh for _, fresh in results) == 1
    assert {path.stat().st_size for path, _ in results} == {3_000_000}


def test_half_a_file_is_not_kept(cache: Path, site: tuple[Path, str, list[str]]) -> None:
    folder, url, _ = site
    (folder / "short.pth").write_bytes(b"x" * 10_000)
    with pytest.raises(UserError, match=rf"cannot download {url}/short\.pth: 5000 of 10000 bytes .*weights=PATH"):
        fetch(f"{url}/short.pth")
    assert names(cache) == []


def test_network_failure_names_address_and_remedy(cache: Path, site: tuple[Path, str, list[str]]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{listener.getsockname()[1]}/w.pth"
    for address, reason in [(f"{site[1]}/none.pth", "HTTP 404"), (closed, "refused"), ("gopher://x/w.pth", "gopher")]:
        with pytest.raises(UserError) as error:
            read_weights(address)
        text = str(error.value)
        assert text.startswith(f"cannot download {address}: ") and reason in text, text
        assert "by hand" in text and "weights=" in text and "\n" not in text
    assert names(cache) == []


def test_unreadable_download_is_thrown_away_but_an_old_file_is_kept(
    cache: Path, site: tuple[Path, str, list[str]]
) -> None:
    folder, url, _ = site
    (folder / "page.pth").write_text("<html>please log in</html>")
    with pytest.raises(UserError, match="thrown away"):
        read_weights(f"{url}/page.pth")
    assert names(cache) == []
    path = cache_path(f"{url}/page.pth")
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"delete .*page\.pth to download it again"):
        read_weights(f"{url}/page.pth")
    assert path.exists()


def test_unwritable_cache_is_one_line(cache: Path, site: tuple[Path, str, list[str]]) -> None:
    folder, url, _ = site
    (folder / "w.bin").write_bytes(b"x")
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the cache folder should be")
    with pytest.raises(UserError, match=r"cannot write .*TORCH_HOME"):
        fetch(f"{url}/w.bin")
