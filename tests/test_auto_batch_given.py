"""What --auto_batch makes of a batch that was given."""

from __future__ import annotations

import pytest

from clusterssl.auto_batch import choices, with_batch
from clusterssl.dist import World
from clusterssl.options import OptimOptions
from clusterssl.precision import Precision
from main_swav import Config


@pytest.mark.parametrize(("given", "chosen"), [(100, 100), (64, 96), (300, 96)])
def test_a_batch_that_leaves_ten_steps_is_not_made_smaller(
    given: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clusterssl.auto_batch._asked", lambda facts: choices(facts["most"])[-1])
    config = Config(optim=OptimOptions(batch_size=given))
    found, _ = with_batch(config, 1000, World(), lambda _: None, Precision(), None)
    assert found.optim.batch_size == chosen
