"""Bad tensors are refused in a sentence that names them; good ones, of any kind, are not."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapter.checks import check_finite, check_tensors, is_freed
from adapter.sources import PlainTensor

CPU = torch.device("cpu")
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


def check(tensor: torch.Tensor, device: torch.device = CPU) -> None:
    check_tensors({"model.w": PlainTensor(tensor)}, device)


def freed() -> torch.Tensor:
    tensor = torch.ones(4, 4)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        pytest.param(torch.empty(2, device="meta"), "is on the meta device", id="meta"),
        pytest.param(torch.eye(2).to_sparse(), "has the layout torch.sparse_coo; make it dense", id="sparse"),
        pytest.param(freed(), "was freed: its storage is smaller than its shape", id="freed"),
    ],
)
def test_a_tensor_that_cannot_be_copied_is_refused_by_name(tensor: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=f"tensor model.w {re.escape(words)}"):
        check(tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3, 5).t(),
        torch.ones(1, 4).expand(3, 4),
        torch.ones(10)[3::2],
        torch.empty(0, 4),
        torch.tensor(1.0),
        torch.ones(2, requires_grad=True),
    ],
    ids=["transposed", "overlapping", "strided", "empty", "scalar", "with-gradient"],
)
def test_a_tensor_of_any_strides_is_copied(tensor: torch.Tensor) -> None:
    check(tensor)
    assert not is_freed(tensor)


def test_a_view_past_the_end_of_what_is_left_of_its_memory_is_freed() -> None:
    base = torch.ones(8)
    head, tail = base[:2], base[6:]
    base.untyped_storage().resize_(8)
    assert not is_freed(head)
    assert is_freed(tail)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_nan_and_infinity_are_found_in_every_dtype(dtype: torch.dtype, value: float) -> None:
    if dtype is torch.float8_e4m3fn:
        value = float("nan")  # the only value of the kind that it has
    tensor = torch.zeros(300, dtype=torch.float32)
    tensor[217] = value
    with pytest.raises(ValueError, match=r"tensor model\.w holds NaN or infinity; it was not sent"):
        check_finite({"model.w": PlainTensor(tensor.to(dtype))})


@given(st.lists(st.floats(-400, 400), max_size=20), st.sampled_from(FLOATS))
def test_finite_numbers_pass_in_every_dtype(values: list[float], dtype: torch.dtype) -> None:
    check_finite({"w": PlainTensor(torch.tensor(values).to(dtype))})


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_whole_numbers_are_finite(dtype: torch.dtype) -> None:
    check_finite({"w": PlainTensor(torch.ones(3, dtype=dtype))})


def test_looking_at_values_makes_no_copy_of_them() -> None:
    weights = torch.zeros(1 << 22)  # 16 MiB
    with torch.profiler.profile(profile_memory=True) as profile:
        check_finite({"w": PlainTensor(weights)})
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert taken < 1 << 20
