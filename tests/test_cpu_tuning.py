"""What stands in for vLLM's slow layers on a CPU against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.vllm

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # bfloat16 keeps 8 bits


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    from vllm.platforms import current_platform

    from workers import cpu_tuning

    if not current_platform.is_cpu():
        pytest.skip("for CPUs only")
    current_platform.import_kernels()
    cpu_tuning.install()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 37])
def test_norms_equal_torch(dtype: torch.dtype, rows: int) -> None:
    from vllm import ir

    from workers.cpu_tuning import PROVIDER

    torch.manual_seed(0)
    x, residual, weight = torch.randn(rows, 96).to(dtype), torch.randn(rows, 96).to(dtype), torch.randn(96).to(dtype)
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    plain = ir.ops.rms_norm.impls[PROVIDER].impl_fn(x.clone(), weight, 1e-5)
    expected = torch.nn.functional.rms_norm(x.double(), (96,), weight.double(), 1e-5)
    torch.testing.assert_close(plain.double(), expected, **close)
    normed, total = ir.ops.fused_add_rms_norm.impls[PROVIDER].impl_fn(x.clone(), residual.clone(), weight, 1e-5)
    torch.testing.assert_close(total, x + residual, **close)
    expected = torch.nn.functional.rms_norm(x.double() + residual.double(), (96,), weight.double(), 1e-5)
    if dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX2":
        close["rtol"] *= 2  # there the kernel cuts off and does not round: once in the sum, once in what is made of it
    torch.testing.assert_close(normed.double(), expected, **close)


def test_norms_that_the_kernels_cannot_do_are_left_to_vllm() -> None:
    from vllm import ir

    from workers.cpu_tuning import PROVIDER

    ours = ir.ops.rms_norm.impls[PROVIDER]
    x, weight = torch.randn(3, 8), torch.ones(8)
    assert ours.supports_args(x, weight, 1e-5)
    assert not ours.supports_args(x, weight, 1e-5, 4)
    assert not ours.supports_args(x, weight.bfloat16(), 1e-5)
    assert not ours.supports_args(torch.randn(8, 3).T, weight, 1e-5)
    assert not ours.supports_args(torch.randn(3, 12), torch.ones(12), 1e-5)  # no multiple of what a vector holds
    assert not ours.supports_args(x, None, 1e-5)
    added = ir.ops.fused_add_rms_norm.impls[PROVIDER]
    assert added.supports_args(x, x.clone(), weight, 1e-5)
    assert not added.supports_args(x, x.bfloat16(), weight, 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_silu_and_mul_equals_torch(dtype: torch.dtype) -> None:
    from workers.cpu_tuning import _SiluAndMul

    x = torch.randn(5, 2 * 48).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    found = _SiluAndMul.forward_cpu(None, x.clone())
    torch.testing.assert_close(
        found.double(), torch.nn.functional.silu(gate) * up, rtol=2 * TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def test_a_sampler_sees_the_same_logits_in_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.sample.sampler import Sampler

    from workers.cpu_tuning import keep_logits

    seen: list[torch.Tensor] = []

    def forward(self: Any, logits: torch.Tensor, sampling_metadata: object) -> object:
        seen.append(logits)
        return sampling_metadata

    monkeypatch.setattr(Sampler, "forward", forward)
    sampler = Sampler()
    keep_logits(sampler)
    for rows, dtype in ((3, torch.bfloat16), (5, torch.bfloat16), (2, torch.float16), (4, torch.float32)):
        logits = torch.randn(rows, 7).to(dtype)
        assert sampler(logits=logits, sampling_metadata=rows) == rows
        assert seen[-1].dtype == torch.float32
        assert torch.equal(seen[-1], logits.float())
    assert seen[1].data_ptr() == seen[2].data_ptr() != seen[0].data_ptr()
    assert seen[3] is logits
