"""Names, shapes, outputs and initialisation against the published networks (golden vectors)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from clusterssl.models.build import MultiCropNet, build_model
from clusterssl.models.identify import Look, describe
from clusterssl.models.weights import flat_state_dict, load_published, published_state_dict
from tests.models.golden import fill_sha256, filled, images, networks, published_names, shapes_of

PUBLISHED = {
    "swav_resnet50": ("resnet50", 2048, 128, 3000, True),
    "swav_resnet50w2": ("resnet50w2", 8192, 128, 3000, True),
    "swav_resnet50w4": ("resnet50w4", 8192, 128, 3000, True),
    "swav_resnet50w5": ("resnet50w5", 8192, 128, 3000, False),
    "deepclusterv2_resnet50": ("resnet50", 2048, 128, (3000, 3000, 3000), True),
    "swav_eval_semisup": ("resnet50", 0, 1000, 0, True),
}


def model_of(name: str) -> MultiCropNet:
    arch, hidden, dim, number, head_bn = PUBLISHED[name]
    with torch.device("meta"):
        return build_model(arch, "imagenet", hidden, dim, number, head_bn)


def published_table(name: str) -> dict[str, torch.Tensor]:
    """Empty tensors of the published names and shapes."""
    return {
        key: torch.empty([int(n) for n in shape.split("x")] if shape else [], device="meta")
        for key, shape in published_names()[name].items()
    }


def fill(model: MultiCropNet) -> MultiCropNet:
    model = model.double()
    state = filled({name: tuple(tensor.shape) for name, tensor in flat_state_dict(model).items()})
    load_published(model, state)
    return model.eval()


def close(got: torch.Tensor, name: str) -> None:
    np.testing.assert_allclose(got.detach().numpy(), networks()[name], rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def swav() -> MultiCropNet:
    return fill(build_model("resnet50", "imagenet", 32, 16, 20))


@pytest.fixture
def crops() -> list[torch.Tensor]:
    sizes = networks()["swav_resnet50_input_sizes"].tolist()
    return [images(f"swav:{i}", 2, 3, size, size) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_order_equal_the_published_file(name: str) -> None:
    state = published_state_dict(model_of(name))
    assert list(shapes_of(state).items()) == list(published_names()[name].items())
    assert all(key.startswith("module.") for key in state)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_published_table_loads_strictly(name: str, prefix: str) -> None:
    model = model_of(name)
    table = {prefix + key: tensor for key, tensor in published_table(name).items()}
    load_published(model, table)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_table_tells_its_network(name: str) -> None:
    arch, hidden, dim, number, head_bn = PUBLISHED[name]
    options = {"hidden_mlp": hidden, "feat_dim": dim, "nmb_prototypes": number, "head_bn": head_bn, "normalize": True}
    assert describe(published_table(name)) == Look(arch, "imagenet", "multicrop", options)


def test_filling_rule_is_the_published_one(swav: MultiCropNet) -> None:
    assert fill_sha256(flat_state_dict(swav)) == str(networks()["swav_resnet50_filled_sha256"])


@torch.no_grad()
def test_multicrop_outputs_in_evaluation_mode(swav: MultiCropNet, crops: list[torch.Tensor]) -> None:
    embedding, scores = swav(crops)
    close(embedding, "swav_resnet50_eval_embedding")
    close(scores, "swav_resnet50_eval_scores")


@torch.no_grad()
def test_feature_map(swav: MultiCropNet, crops: list[torch.Tensor]) -> None:
    feature_map = swav.backbone.forward_map(crops[0])
    assert feature_map.shape == tuple(networks()["swav_resnet50_map_shape"])
    close(feature_map.reshape(2, -1)[:, ::16], "swav_resnet50_map_every16")
    feature_map = swav.backbone.forward_map(images("swav224", 1, 3, 224, 224))
    assert feature_map.shape == tuple(networks()["swav_resnet50_map224_shape"])
    close(feature_map.reshape(1, -1)[:, ::97], "swav_resnet50_map224_every97")


@torch.no_grad()
def test_multicrop_outputs_and_statistics_in_training_mode(crops: list[torch.Tensor]) -> None:
    model = fill(build_model("resnet50", "imagenet", 32, 16, 20)).train()
    embedding, scores = model(crops)
    close(embedding, "swav_resnet50_train_embedding")
    close(scores, "swav_resnet50_train_scores")
    for norm, name in ((model.backbone.bn1, "bn1"), (model.projection_head[1], "head_bn")):
        close(norm.running_mean, f"swav_resnet50_{name}_running_mean_after")
        close(norm.running_var, f"swav_resnet50_{name}_running_var_after")
        assert norm.num_batches_tracked == networks()[f"swav_resnet50_{name}_batches_after"]


@torch.no_grad()
def test_several_prototype_layers(crops: list[torch.Tensor]) -> None:
    model = fill(build_model("resnet50", "imagenet", 32, 16, [5, 7, 4]))
    embedding, scores = model(crops)
    close(embedding, "dcv2_resnet50_eval_embedding")
    assert len(scores) == 3
    for head, scores_NK in enumerate(scores):
        close(scores_NK, f"dcv2_resnet50_eval_scores{head}")


@torch.no_grad()
def test_single_linear_head_without_normalisation(crops: list[torch.Tensor]) -> None:
    model = fill(build_model("resnet50", "imagenet", 0, 20, 0, normalize=False))
    logits, scores = model(crops[:1])
    close(logits, "swav_resnet50_semisup_eval_logits")
    assert scores == []


@torch.no_grad()
def test_double_width() -> None:
    model = fill(build_model("resnet50w2", "imagenet", 32, 16, 20))
    size = int(networks()["swav_resnet50w2_input_size"])
    embedding, scores = model([images("w2", 2, 3, size, size)])
    close(embedding, "swav_resnet50w2_eval_embedding")
    close(scores, "swav_resnet50w2_eval_scores")


@pytest.mark.parametrize(
    ("golden", "arch", "prototypes"),
    [
        ("swav_resnet50", "resnet50", 20),
        ("dcv2_resnet50", "resnet50", (5, 7, 4)),
        ("swav_resnet50w2", "resnet50w2", 20),
    ],
)
def test_initialisation_statistics(golden: str, arch: str, prototypes: int | tuple[int, ...]) -> None:
    torch.manual_seed(5)
    state = flat_state_dict(build_model(arch, "imagenet", 32, 16, prototypes))
    keys = networks()[f"{golden}_init_keys"].tolist()
    rows = networks()[f"{golden}_init_numel_mean_std_min_max"]
    assert keys == [key for key in state if not key.endswith("num_batches_tracked")]
    for key, (numel, mean, std, low, high) in zip(keys, rows, strict=True):
        x = state[key].flatten()
        assert x.numel() == numel, key
        if low == high:  # BatchNorm: constant
            assert x.unique().tolist() == [mean], key
            continue
        # Two samples of one distribution: six standard errors of the difference.
        assert abs(x.mean() - mean) < 6 * std * (2 / numel) ** 0.5, key
        assert abs(x.std() - std) < 6 * std * numel**-0.5, key
        if "projection_head" in key or "prototypes" in key:  # uniform: hard bound, shared by both samples
            fan_in = state[key.replace("bias", "weight")].shape[1]
            assert max(x.abs().max(), -low, high) <= fan_in**-0.5 * (1 + 1e-6), key


def test_convolutions_are_normal_with_fan_out_variance() -> None:
    torch.manual_seed(5)
    model = build_model("resnet50", "imagenet", 0, 16, 4)
    for name, layer in model.backbone.named_modules():
        if isinstance(layer, nn.Conv2d):
            x = layer.weight.flatten()
            sigma = (2 / (layer.kernel_size[0] ** 2 * layer.out_channels)) ** 0.5
            assert abs(x.std() / sigma - 1) < 6 / (2 * x.numel()) ** 0.5, name
            assert x.abs().max() > 3 * sigma, name
