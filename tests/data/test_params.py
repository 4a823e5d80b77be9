"""Augmentation parameters: their distributions are the published ones, over 10,000 draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from clusterssl.data import MultiCrop
from clusterssl.data.params import JITTER_ORDERS, NUM_PARAMS, Param
from clusterssl.errors import UserError

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "multicrop.npz"
N = 10_000


def draws(**strengths: object) -> np.ndarray:
    """Parameters of N images and two views, [N, 2, P]."""
    crop = MultiCrop((2,), (32,), **strengths)  # type: ignore[arg-type]
    return crop.params(crop.uniforms(31, 2, np.arange(N)))


def share_is(column: np.ndarray, p: float) -> None:
    """The share of ones is p within five standard errors."""
    assert abs((column > 0).mean() - p) < 5 * np.sqrt(p * (1 - p) / column.size) + 1e-12


def uniform_in(values: np.ndarray, low: float, high: float) -> None:
    """Kolmogorov-Smirnov against the uniform distribution."""
    assert stats.kstest(values, "uniform", args=(low, high - low)).pvalue > 1e-4


@pytest.mark.parametrize("view", [0, 1])
def test_published_distributions(view: int) -> None:
    golden = np.load(GOLDEN)
    params = draws()[:, view].astype(np.float64)
    assert params.shape == (N, NUM_PARAMS)
    share_is(params[:, Param.FLIP], 0.5)
    share_is(params[:, Param.JITTER], float(golden["color_jitter_p"]))
    share_is(params[:, Param.GRAY], float(golden["gray_p"]))
    blur_p, radius_low, radius_high = golden["blur"]
    share_is(params[:, Param.SIGMA], blur_p)
    share_is(params[:, Param.SOLARIZE], 0.0)
    uniform_in(params[params[:, Param.SIGMA] > 0, Param.SIGMA], radius_low, radius_high)
    jittered = params[params[:, Param.JITTER] > 0]
    columns = (Param.BRIGHTNESS, Param.CONTRAST, Param.SATURATION, Param.HUE)
    for column, (low, high) in zip(columns, golden["color_jitter"], strict=True):
        uniform_in(jittered[:, column], low, high)
    counts = np.bincount(params[:, Param.ORDER].astype(int), minlength=24)
    assert len(counts) == len(JITTER_ORDERS) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


def test_choices_are_independent() -> None:
    params = draws()
    columns = [Param.FLIP, Param.JITTER, Param.GRAY, Param.SIGMA, Param.ORDER]
    both_views = np.concatenate([params[:, 0][:, columns], params[:, 1][:, columns]], axis=1)
    correlation = np.corrcoef(both_views.T)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / np.sqrt(N)


def test_untouched_images_carry_neutral_values() -> None:
    params = draws()
    plain = params[params[..., Param.JITTER] == 0]
    np.testing.assert_array_equal(plain[:, [Param.BRIGHTNESS, Param.CONTRAST, Param.SATURATION]], 1)
    np.testing.assert_array_equal(plain[:, Param.HUE], 0)


def test_strengths_and_probabilities_per_view() -> None:
    params = draws(color_jitter=(0.4, 0.4, 0.2, 0.1), blur_p=(0.1, 1.0), solarize_p=(0.0, 0.2), gray_p=0.0)
    share_is(params[:, 0, Param.SIGMA], 0.1)
    assert (params[:, 1, Param.SIGMA] > 0).all()
    share_is(params[:, 1, Param.SOLARIZE], 0.2)
    assert not params[:, 0, Param.SOLARIZE].any() and not params[..., Param.GRAY].any()
    jittered = params[params[..., Param.JITTER] > 0].astype(np.float64)
    uniform_in(jittered[:, Param.SATURATION], 0.8, 1.2)
    uniform_in(jittered[:, Param.HUE], -0.1, 0.1)


def test_one_option_does_not_move_the_draws_of_another() -> None:
    full, no_blur = draws(), draws(blur_p=0.0)
    others = [p for p in Param if p != Param.SIGMA]
    np.testing.assert_array_equal(full[..., others], no_blur[..., others])


@pytest.mark.parametrize(
    ("strengths", "told"),
    [
        ({"blur_p": 1.5}, "blur_p"),
        ({"gray_p": (0.1, 0.2, 0.3)}, "gray_p has 3 values for 2 views"),
        ({"color_jitter": -0.1}, "color_jitter"),
        ({"color_jitter": 2.4}, "color_jitter"),
        ({"blur_radius": (0.0, 2.0)}, "blur_radius"),
        ({"flip_p": float("nan")}, "flip_p"),
    ],
)
def test_impossible_strengths(strengths: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        draws(**strengths)
