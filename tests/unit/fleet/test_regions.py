"""Memory that broadcasts are sent from."""

import pytest
import torch

from adapter.fleet.regions import PlainRegions
from adapter.planner import TensorSpec, plan

CPU = torch.device("cpu")


def test_regions_come_in_turn_and_stay() -> None:
    regions = PlainRegions(2)
    taken = [regions.take(bucket, [8, 16], CPU) for bucket in range(4)]
    assert taken[0] is taken[2]
    assert taken[1] is taken[3]
    assert [region.flat.numel() for region in taken[:2]] == [8, 16]


def test_a_larger_one_is_kept_and_a_smaller_one_is_replaced() -> None:
    regions = PlainRegions(1)
    first = regions.take(0, [16], CPU)
    assert regions.take(0, [8], CPU) is first
    assert regions.take(0, [32], CPU).flat.numel() == 32


def test_views_lie_where_the_plan_says_and_are_made_once_for_it() -> None:
    regions = PlainRegions(1)
    cut = plan([TensorSpec("b", torch.uint8, (3,)), TensorSpec("a", torch.float32, (2,))], 1 << 10, dense=True)
    flat = regions.take(0, [cut.buckets[0].num_bytes], CPU).flat
    views = regions.views(cut, 0)
    assert [(tuple(view.shape), view.dtype) for view in views] == [((2,), torch.float32), ((3,), torch.uint8)]
    assert [view.data_ptr() - flat.data_ptr() for view in views] == [0, 8]
    assert regions.views(cut, 0) is views
    regions.take(0, [1 << 10], CPU)
    assert regions.views(cut, 0)[0].data_ptr() != views[0].data_ptr()


def test_released_memory_is_made_anew() -> None:
    regions = PlainRegions(1)
    first = regions.take(0, [8], CPU)
    regions.release()
    assert regions.take(0, [8], CPU) is not first


def test_no_region_at_all_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="staging_buffers must be 1 or more, not 0"):
        PlainRegions(0)
