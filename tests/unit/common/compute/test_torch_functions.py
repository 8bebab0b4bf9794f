from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from common.compute.torch_functions import exponential, silu


@pytest.mark.parametrize("count", [0, 1, 31, 33, 4096, 5000])
def test_value_keeps_its_bits_at_any_place(count: int) -> None:
    x = torch.linspace(-90, 80, 5000)
    assert torch.equal(exponential(x[:count]), exponential(x)[:count])
    assert torch.equal(exponential(x[5000 - count :]), exponential(x)[5000 - count :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_is_that_of_torch(dtype: torch.dtype) -> None:
    x = torch.linspace(-100, 100, 3000, dtype=dtype).view(3, -1)[:, 7:]
    torch.testing.assert_close(silu(x), functional.silu(x))
