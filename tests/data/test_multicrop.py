"""Multi-crop: what is drawn, and that it is a pure function."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clusterssl.data import MultiCrop, open_source
from clusterssl.data.dataset import MultiCropDataset
from clusterssl.errors import UserError

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "multicrop.npz"
CASES = ["swav_2x224_6x96", "dcv2_2x160_4x96", "two224", "three_groups", "tiny"]


@pytest.mark.parametrize("case", CASES)
def test_views_have_the_published_shapes_and_order(case: str) -> None:
    golden = np.load(GOLDEN)
    params = json.loads(str(golden[f"{case}_params"]))
    crop = MultiCrop(params["n"], params["size"], params["min"], params["max"])
    assert crop.num_views == len(golden[f"{case}_shapes"])
    batch = MultiCropDataset(open_source("synthetic:4:60x80"), crop, 0)[(0, 1)]
    assert [tuple(view.shape[1:]) for view in batch.crops] == [tuple(s) for s in golden[f"{case}_shapes"].tolist()]
    for v, (low, high) in enumerate(crop.scales):
        group = int(np.searchsorted(np.cumsum(params["n"]), v, side="right"))
        assert (low, high) == (params["min"][group], params["max"][group])


def test_draw_is_a_pure_function() -> None:
    crop = MultiCrop((2, 6), (224, 96), (0.14, 0.05), (1.0, 0.14))
    one = crop.draw(31, 3, 1234, 375, 500)
    assert one.boxes_V4.shape == (8, 4) and one.params_VP.shape[0] == 8
    again = MultiCrop((2, 6), (224, 96), (0.14, 0.05), (1.0, 0.14)).draw(31, 3, 1234, 375, 500)
    np.testing.assert_array_equal(one.boxes_V4, again.boxes_V4)
    np.testing.assert_array_equal(one.params_VP, again.params_VP)
    for other in [(32, 3, 1234), (31, 4, 1234), (31, 3, 1235)]:
        drawn = crop.draw(*other, 375, 500)
        assert (drawn.boxes_V4 != one.boxes_V4).any() and (drawn.params_VP != one.params_VP).any()
    assert len({tuple(box) for box in one.boxes_V4.tolist()}) == 8


def test_drawn_values_stay_as_they_are() -> None:
    """Guards the stream: other numbers here would change every run that is resumed with a newer version."""
    drawn = MultiCrop((1, 1), (224, 96), (0.14, 0.05), (1.0, 0.14)).draw(31, 3, 1234, 375, 500)
    assert drawn.boxes_V4.tolist() == EXPECTED_BOXES
    np.testing.assert_allclose(drawn.params_VP, EXPECTED_PARAMS, rtol=1e-6)


EXPECTED_BOXES = [[46, 79, 305, 295], [235, 299, 133, 140]]
EXPECTED_PARAMS = [
    [1.0, 1.0, 11.0, 1.7177253, 1.1580909, 0.6757963, 0.0910628, 0.0, 0.0, 0.0],
    [1.0, 0.0, 23.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.7733277, 0.0],
]


def test_sizes_square_or_not() -> None:
    crop = MultiCrop((1, 2), (224, (112, 64)), (0.1, 0.1), (1.0, 1.0))
    assert crop.sizes == ((224, 224), (112, 64), (112, 64))
    assert crop.size_crops == ((224, 224), (112, 64))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (((2, 6), (224,), (0.1, 0.1), (1.0, 1.0)), "--nmb_crops has 2, --size_crops has 1"),
        (((), (), (), ()), "differ in length"),
        (((0,), (224,), (0.1,), (1.0,)), "at least 1"),
        (((2,), (0,), (0.1,), (1.0,)), "at least 1 pixel"),
        (((2,), ((1, 2, 3),), (0.1,), (1.0,)), "crop size"),
        (((2,), (224,), (0.5,), (0.4,)), "crop scale 0.5 to 0.4"),
        (((2,), (224,), (0.0,), (0.4,)), "crop scale"),
        (((2,), (224,), (0.1,), (1.4,)), "crop scale"),
        (((2,), (224,), (float("nan"),), (1.0,)), "crop scale"),
    ],
)
def test_impossible_crops(arguments: tuple, told: str) -> None:
    with pytest.raises(UserError, match=told):
        MultiCrop(*arguments)
