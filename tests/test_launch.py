"""What tells one compiled kernel from another."""

from __future__ import annotations

import torch

from portable_mla.launch import alignment


def test_on_amd_a_tensor_beyond_two_gigabytes_needs_a_kernel_of_its_own() -> None:
    near, far = (torch.empty(size, dtype=torch.uint8, device="meta") for size in (2**31 - 1, 2**31))
    assert alignment(near, None, amd=False) == alignment(far, None, amd=False)
    assert alignment(near, None, amd=True) != alignment(far, None, amd=True)


def test_an_address_that_forbids_wide_access_needs_a_kernel_of_its_own() -> None:
    whole = torch.empty(64, dtype=torch.uint8)
    assert alignment(whole) != alignment(whole[1:])
