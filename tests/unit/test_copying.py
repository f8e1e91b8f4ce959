"""Many tensors at once are copied as each would be alone."""

import subprocess
import sys

import pytest
import torch

from adapter.copying import LARGE_BYTES, copy_all


def test_large_and_small_tensors_of_any_strides_and_dtype_arrive() -> None:
    large = torch.arange(LARGE_BYTES // 4, dtype=torch.float32)
    sources = [
        torch.ones(3, 5).t(),
        large.to(torch.float64),
        torch.tensor(7),
        torch.ones(1, 4).expand(3, 4),
        large.view(2, -1).t(),
        torch.empty(0),
    ]
    destinations = [torch.zeros(source.shape, dtype=torch.float32) for source in sources]
    copy_all(destinations, sources)
    for destination, source in zip(destinations, sources, strict=True):
        assert torch.equal(destination, source.to(torch.float32))


@pytest.mark.parametrize("num_elements", [1, LARGE_BYTES])
def test_parameters_are_copied_without_a_trace_for_autograd(num_elements: int) -> None:
    destination, source = torch.zeros(num_elements), torch.nn.Parameter(torch.ones(num_elements))
    copy_all([destination], [source])
    assert not destination.requires_grad
    assert bool((destination == 1).all())


def test_nothing_is_copied_from_nothing() -> None:
    copy_all([], [])


def test_a_source_too_many_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 destinations for 1 sources"):
        copy_all([], [torch.ones(1)])


def test_it_needs_torch_alone() -> None:
    script = "import sys, torch; before = set(sys.modules); import adapter.copying; print(set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert not {"grpc", "google", "sidecar"} & {name.split(".")[0] for name in eval(done.stdout)}
