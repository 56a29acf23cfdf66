"""The CPU's linear of 16-bit weights against arithmetic in float64 on the very same weights."""

from __future__ import annotations

import pytest
import torch

from blip2.language.native.fp16 import Float16Linear

pytestmark = pytest.mark.skipif(
    not Float16Linear.takes(torch.float16), reason="FBGEMM is for x86 with AVX2"
)


@pytest.mark.parametrize("dtype, smallest", [(torch.float16, 2.0**-24), (torch.bfloat16, 2.0**-22)])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_keeps_every_digit_of_the_weight(dtype, smallest, rows, magnitude):
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(50, 100, generator=generator).mul(magnitude).to(dtype)
    weight[7] = 0
    # Alone in its channel, a weight that float16 has no normal number for.
    weight[7, 3] = smallest
    bias = torch.randn(50, generator=generator).to(dtype)
    x = torch.randn(2, rows, 100, generator=generator)
    expected = x.double() @ weight.double().T
    y = Float16Linear.pack(weight, None, None)(x)
    assert y.dtype == torch.float32
    norms = x.double().norm(dim=-1)[..., None] * weight.double().norm(dim=-1)
    assert ((y - expected).abs() <= 1e-6 * norms).all()
    biased = Float16Linear.pack(weight, bias, None)(x)
    torch.testing.assert_close(biased, y + bias.float())


def test_bfloat16_beyond_float16s_range():
    weight = torch.tensor([[1e30, -3e28], [2e25, 1e30]], dtype=torch.bfloat16)
    x = torch.tensor([[1.5, 2.5]])
    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(
        Float16Linear.pack(weight, None, None)(x), expected, rtol=1e-6, atol=0
    )


def test_takes_no_other_weights():
    assert not Float16Linear.takes(torch.float32)
