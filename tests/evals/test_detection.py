"""Detection: folders, what the evaluation counts, the detectors and their random choices."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from clusterssl.batchnorm import CPUSyncBatchNorm
from clusterssl.errors import UserError
from clusterssl.evals.detection import box_precisions, check_metric, detections, rate_at, train_step, training_batches
from clusterssl.evals.detection_data import DetectionSet, open_sets
from clusterssl.evals.detectors import CountedSampler, build_detector, count_samples, scale_of, set_mode, set_size
from clusterssl.models.build import build_backbone
from tests.evals.voc import tiny_voc, unpacked
from tests.ranks import run_ranks

pytest.importorskip("torchmetrics")
pytest.importorskip("faster_coco_eval")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> tuple[DetectionSet, DetectionSet]:
    return open_sets(str(unpacked("coco-tiny", tmp_path_factory.mktemp("coco"))), (2007,), masks=True)


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> tuple[DetectionSet, DetectionSet]:
    return open_sets(str(unpacked("voc2007-subset", tmp_path_factory.mktemp("voc"))), (2007,), masks=False)


def tiny(tmp_path: Path) -> tuple[DetectionSet, DetectionSet]:
    return open_sets(str(tiny_voc(tmp_path, {"trainval": 8, "test": 5})), (2007,), masks=False)


def test_coco_is_read_whole(coco: tuple[DetectionSet, DetectionSet]) -> None:
    train, test = coco
    assert [len(train.images), len(train.labels_K), int(train.ignored_K.sum())] == [34, 292, 3]
    assert [len(test.images), len(test.labels_K), int(test.ignored_K.sum())] == [24, 212, 3]
    assert len(train.classes) == 80 and train.classes[0] == "person" and train.classes[79] == "toothbrush"
    for i in range(len(test.images)):
        _, height, width = test.images.load(i).shape
        target = test.target(i, all_objects=True)
        assert target["masks"].shape == (len(target["boxes"]), height, width)
        assert ((target["boxes"][:, 2:] - target["boxes"][:, :2]) > 0).all()
        for mask, box, crowd in zip(target["masks"], target["boxes"], target["iscrowd"], strict=True):
            rows, columns = torch.where(mask > 0)
            edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert crowd or (edges - box).abs().max() < 4, "boxes are drawn around outlines that masks round"
    assert len(train.target(0, all_objects=False)["boxes"]) <= len(train.target(0, all_objects=True)["boxes"])


def test_voc_is_read_whole(voc: tuple[DetectionSet, DetectionSet], tmp_path: Path) -> None:
    train, test = voc
    assert len(train.images) == 160 and len(test.images) == 90 and len(test.classes) == 20
    assert test.ignored_K.any() and len(test.with_objects()) == 90
    per_class = Counter(test.classes[label - 1] for label in test.labels_K)
    assert per_class["person"] > 50 and min(per_class.values()) >= 4


def perfect(images: DetectionSet, shift: float = 0.0) -> Any:
    """The ground truth as predictions, moved to the right by a share of the boxes' widths."""
    for i in range(len(images.images)):
        target = images.target(i, all_objects=True)
        kept = ~target["iscrowd"]
        found = {name: target[name][kept] for name in target if name in ("boxes", "labels", "masks")}
        found["boxes"] = found["boxes"].clone()
        found["boxes"][:, [0, 2]] += shift * (found["boxes"][:, [2]] - found["boxes"][:, [0]])
        yield {**found, "scores": torch.linspace(1, 0.5, int(kept.sum()))}, target


@pytest.mark.parametrize("name", ["coco", "voc"])
def test_the_ground_truth_scores_100_and_shifted_less(name: str, request: pytest.FixtureRequest) -> None:
    test = request.getfixturevalue(name)[1]
    best = box_precisions(perfect(test))
    assert best["map"] == best["map_50"] == best["map_75"] == pytest.approx(100, abs=1e-3)
    little, much = box_precisions(perfect(test, 0.1)), box_precisions(perfect(test, 0.25))
    assert much["map"] < little["map"] < 75
    assert little["map_75"] > 95 and much["map_50"] > 90, "overlaps are 0.9 / 1.1 and 0.75 / 1.25"
    assert much["map_75"] < 10
    assert box_precisions(perfect(test, 1.0))["map_50"] < 15


def test_masks_of_the_ground_truth_score_100(coco: tuple[DetectionSet, DetectionSet]) -> None:
    found = box_precisions(perfect(coco[1]), masks=True)
    assert found["segm_map"] == pytest.approx(100, abs=1e-3) and found["map"] == pytest.approx(100, abs=1e-3)


def objects(*boxes: list[float], crowd: tuple[bool, ...] = ()) -> dict[str, Tensor]:
    tensor = torch.tensor(boxes)
    crowd = crowd or (False,) * len(boxes)
    area = (tensor[:, 2] - tensor[:, 0]) * (tensor[:, 3] - tensor[:, 1])
    return {"boxes": tensor, "labels": torch.ones(len(boxes), dtype=torch.int64), "iscrowd": torch.tensor(crowd),
            "area": area}  # fmt: skip


def test_by_hand() -> None:
    left, right = [0.0, 0, 40, 40], [60.0, 0, 100, 40]
    one = {"boxes": torch.tensor([left]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    half = box_precisions([(one, objects(left, right))])["map"]
    assert half == pytest.approx(100 * 51 / 101, abs=1e-3), "precision 1 at the recalls 0, 0.01 .. 0.5"
    ignored = box_precisions([(one, objects(left, right, crowd=(False, True)))])["map"]
    assert ignored == pytest.approx(100, abs=1e-3)
    two = {"boxes": torch.tensor([right, left]), "labels": torch.ones(2, dtype=torch.int64),
           "scores": torch.tensor([0.9, 0.8])}  # fmt: skip
    assert box_precisions([(two, objects(left))])["map"] == pytest.approx(50, abs=1e-3)
    assert box_precisions([(two, objects(left, right, crowd=(False, True)))])["map"] == pytest.approx(100, abs=1e-3)


def test_samples_are_as_many_as_torchvisions_and_counted() -> None:
    theirs = BalancedPositiveNegativeSampler(16, 0.25)
    ours = CountedSampler(theirs, seed=1, kind=0)
    random = torch.Generator().manual_seed(0)
    matched = [
        torch.randint(-1, 3, (200,), generator=random),
        torch.tensor([0] * 50 + [1]),
        torch.tensor([1] * 8 + [-1, 0]),
    ]
    ours.step, ours.index = 3, [7, 8, 9]
    found = ours(matched)
    for masks, expected, wanted in zip(found, theirs(matched), ("positive", "negative"), strict=True):
        for mask, other, match in zip(masks, expected, matched, strict=True):
            assert mask.sum() == other.sum() and mask.dtype == other.dtype
            assert not mask[match == -1].any() and not mask[(match >= 1) != (wanted == "positive")].any()
    alone = CountedSampler(theirs, seed=1, kind=0)
    alone.step, alone.index = 3, [8]
    assert torch.equal(alone([matched[1]])[1][0], found[1][1]), "an image's draws do not depend on the others"
    alone.step = 4
    assert not torch.equal(alone([matched[1]])[1][0], found[1][1])
    counts = torch.zeros(51)
    for step in range(2000):
        alone.step = step
        counts += alone([matched[1]])[1][0]
    assert counts[50] == 0 and counts[:50].std() < 3 * (2000 * 0.3 * 0.7) ** 0.5 and counts[:50].mean() == 600


def rows_on_a_rank(rank: int, world_size: int, root: str) -> list[list[int]]:
    train, _ = open_sets(root, (2007,), masks=False)
    batches = training_batches(train, 3, 11, batch_size=4 // world_size, seed=1, workers=0)
    return [[i for _, _, i in items] for items, _ in batches]


def test_no_rank_is_ever_without_images(tmp_path: Path) -> None:
    """BatchNorm of all ranks would wait for it; one image is left over in every epoch."""
    root = str(tiny_voc(tmp_path, {"trainval": 9, "test": 3}))
    alone = rows_on_a_rank(0, 1, root)
    shares = run_ranks(rows_on_a_rank, 2, root)
    assert [a + b for a, b in zip(*shares, strict=True)] == alone and len(alone) == 8
    assert all(len(rows) == 2 for share in shares for rows in share)
    for first in (1, 3, 5):  # from step 3 on: the second step of epoch 1, then whole epochs
        assert len({*alone[first], *alone[first + 1]}) == 8
    train, _ = open_sets(root, (2007,), masks=False)
    assert len(next(training_batches(train, 0, 1, batch_size=99, seed=1, workers=0))[0]) == 9


def test_schedule() -> None:
    rates = [rate_at(step, lr=0.02, warmup=10, lr_steps=(20, 30)) for step in (0, 5, 10, 19, 20, 29, 30)]
    assert rates == pytest.approx([2e-5, 0.02 * 0.5005, 0.02, 0.02, 2e-3, 2e-3, 2e-4])
    sizes = [scale_of(step, 1, (480, 640, 800)) for step in range(600)]
    assert set(sizes) == {480, 640, 800} and all(150 < sizes.count(size) < 250 for size in set(sizes))
    assert scale_of(3, 1, (480, 640, 800)) == sizes[3]


def detector(kind: Any, num_classes: int, new_bn: bool = False, stem: str = "imagenet") -> nn.Module:
    torch.manual_seed(0)
    return build_detector(
        kind, build_backbone("resnet18", stem), num_classes, std=(0.2, 0.2, 0.2), test_size=48, max_size=64,
        new_bn=new_bn, proposals=16,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "new_bn", "frozen"),
    [("faster_rcnn", True, False), ("retinanet", True, True), ("faster_rcnn", False, True)],
)
def test_two_steps_train_what_they_should(tmp_path: Path, kind: Any, new_bn: bool, frozen: bool) -> None:
    train, test = tiny(tmp_path)
    model = detector(kind, len(train.classes), new_bn)
    set_mode(model, True, frozen=frozen)
    model.backbone.body.requires_grad_(not frozen)  # type: ignore[union-attr]
    samplers = count_samples(model, seed=3)
    assert len(samplers) == (0 if kind == "retinanet" else 2)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, batch in enumerate(training_batches(train, 0, 2, batch_size=2, seed=1, workers=0)):
        assert len(batch[0]) == 2 == batch[1]
        assert torch.isfinite(train_step(model, parameters, samplers, optimizer, number, batch, CPU))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    body = {name for name in before if name.startswith("backbone.body.")}
    assert not changed & body if frozen else {"backbone.body.conv1.weight", "backbone.body.bn1.running_mean"} <= changed
    assert any("fpn" in name for name in changed)
    norms = [name for name in changed - body if name.endswith("running_mean")]
    assert bool(norms) == new_bn
    model.eval()
    if kind == "faster_rcnn":
        model.rpn._post_nms_top_n["testing"] = 20  # type: ignore[index,union-attr]
    pairs = list(detections(model, test, CPU, 0))
    assert len(pairs) == len(test.images) and 0 <= box_precisions(pairs)["map"] <= 100


def test_masks_are_trained_and_found(coco: tuple[DetectionSet, DetectionSet]) -> None:
    train, _ = coco
    model = detector("mask_rcnn", len(train.classes))
    set_mode(model, True, frozen=False)
    parameters, samplers = list(model.parameters()), count_samples(model, seed=3)
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    before = model.roi_heads.mask_predictor.mask_fcn_logits.weight.clone()  # type: ignore[union-attr]
    for number, batch in enumerate(training_batches(train, 0, 2, batch_size=1, seed=1, workers=0)):
        assert torch.isfinite(train_step(model, parameters, samplers, optimizer, number, batch, CPU))
    assert not torch.equal(before, model.roi_heads.mask_predictor.mask_fcn_logits.weight)  # type: ignore[union-attr]
    model.eval()
    model.roi_heads.score_thresh, model.roi_heads.detections_per_img = 0.0, 4  # type: ignore[union-attr]
    found, target = next(iter(detections(model, train, CPU, 0)))
    assert found["masks"].shape[1:] == target["masks"].shape[1:] and len(found["masks"]) == len(found["boxes"]) > 0


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_what_is_found_does_not_depend_on_the_first_image(stem: str) -> None:
    """torchvision's pooling guesses its scales from the first image, wrongly where that is small."""
    seen, fresh = (detector("faster_rcnn", 3, stem=stem).eval() for _ in range(2))
    image = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        set_size(seen, 36)
        seen([image])
        for model in (seen, fresh):
            model.transform.max_size = 96  # type: ignore[union-attr]
            set_size(model, 64)
        assert torch.equal(seen([image])[0]["boxes"], fresh([image])[0]["boxes"])
        pool = detector("faster_rcnn", 3, stem=stem).roi_heads.box_roi_pool  # type: ignore[union-attr]
        scales, pool.scales = pool.scales, None
        maps = fresh.backbone(image[None])  # type: ignore[operator]
        pool(maps, [torch.tensor([[0.0, 0, 9, 9]])], [(64, 96)])
        assert pool.scales == scales


def test_new_layers_have_batchnorm_to_share() -> None:
    from clusterssl import batchnorm

    model = batchnorm._convert(detector("mask_rcnn", 3, new_bn=True), None)
    shared = [name for name, module in model.named_modules() if isinstance(module, CPUSyncBatchNorm)]
    for part in ("backbone.body", "backbone.fpn", "roi_heads.box_head", "roi_heads.mask_head"):
        assert any(name.startswith(part) for name in shared), part


def test_networks_without_stages_are_refused() -> None:
    with pytest.raises(UserError, match="--arch conv4w4: detectors need the four stages of a ResNet"):
        build_detector(
            "retinanet", build_backbone("conv4w4", "small"), 3, std=(1, 1, 1), test_size=32, max_size=32, new_bn=True
        )


def test_absent_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_metric()
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match="detection needs faster-coco-eval; run pip install faster-coco-eval"):
        check_metric()
