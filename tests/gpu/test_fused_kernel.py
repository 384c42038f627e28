"""The optimizers' fused kernel, by which weights are moved off the CPU: whether it moves all of them."""

from __future__ import annotations

import pytest
import torch

from hf_sam.update import buckets

SIZES = (1, 7, 1000, 4099)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def weights_and_directions(device, dtype):
    generator = torch.Generator().manual_seed(0)
    return (
        [torch.randn(size, generator=generator).to(device, dtype) for size in SIZES],
        [torch.randn(size, generator=generator).to(device, dtype) for size in SIZES],
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_itself_moves_every_number_on_cuda(dtype):
    weights, directions = weights_and_directions("cuda", DTYPES[dtype])
    expected = [(w.float() + 0.5 * d.float()).to(w.dtype) for w, d in zip(weights, directions, strict=True)]
    assert buckets._fused_kernel_is_correct(weights[0].device, weights[0].dtype)
    buckets._add_fused_(weights, directions, torch.full((), 0.5, device="cuda"), torch.zeros((), device="cuda"))
    for moved, right in zip(weights, expected, strict=True):
        torch.testing.assert_close(moved, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_moved_by_whichever_way_is_taken(device, dtype):
    weights, directions = weights_and_directions(device, DTYPES[dtype])
    expected = [(w.float() + 0.5 * d.float()).to(w.dtype) for w, d in zip(weights, directions, strict=True)]
    buckets.add_multiple_(weights, directions, torch.full((), 0.5, device=device))
    for moved, right in zip(weights, expected, strict=True):
        torch.testing.assert_close(moved, right)


def test_a_kernel_that_leaves_part_of_a_tensor_unmoved_is_not_used(monkeypatch):
    kernel = torch._fused_sgd_

    def moves_only_whole_vectors(mine, theirs, *args, **kwargs):
        whole = [slice(0, len(t) // 8 * 8) for t in mine]
        return kernel(
            [t[rows] for t, rows in zip(mine, whole, strict=True)],
            [t[rows] for t, rows in zip(theirs, whole, strict=True)],
            *args,
            **kwargs,
        )

    monkeypatch.setattr(torch, "_fused_sgd_", moves_only_whole_vectors)
    buckets._fused_kernel_is_correct.cache_clear()
    try:
        weights, directions = weights_and_directions("cpu", torch.float32)
        expected = [w + 0.5 * d for w, d in zip(weights, directions, strict=True)]
        buckets.add_multiple_(weights, directions, 0.5)
        assert not buckets._fused_kernel_is_correct(weights[0].device, torch.float32)
    finally:
        buckets._fused_kernel_is_correct.cache_clear()
    for moved, right in zip(weights, expected, strict=True):
        torch.testing.assert_close(moved, right)
