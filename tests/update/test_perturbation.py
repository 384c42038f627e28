import itertools
import sys

import pytest
import torch
from torch import nn

from hf_sam.update import buckets
from hf_sam.update.perturbation import Perturbation, round_stochastically
from hf_sam.update.vector import Vector

# How weights are put back: by pointing to where they have stayed, by copying each one, or by copying whole lists.
WAYS = {"pointing": {"swaps_memory": True}, "copying": {}, "in buckets": {"in_buckets": True}}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

in_every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(params=["one bucket", "many buckets"], autouse=True)
def _size_of_buckets(request, monkeypatch):
    if request.param == "many buckets":
        if "buckets" not in request.node.name:
            pytest.skip("has no buckets")
        monkeypatch.setattr(buckets, "BUCKET_BYTES", 32)
