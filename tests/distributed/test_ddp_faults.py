"""Two processes: resumed without a state, with gradients in DDP's own memory, with parameters of several types."""

from __future__ import annotations

import pytest
import torch
from distributed import faulty_runs
from distributed.faulty_runs import ORDERS
from distributed.launching import Launched

pytestmark = pytest.mark.slow

# --- checkpoints without a state -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def missing_everywhere(tmp_path_factory) -> Launched:
    return Launched(tmp_path_factory.mktemp("resumed"), "distributed.faulty_runs.missing_everywhere")


@pytest.fixture(scope="module")
def missing_at_rank_0(tmp_path_factory) -> Launched:
    return Launched(tmp_path_factory.mktemp("resumed"), "distributed.faulty_runs.missing_at_rank_0")


@pytest.fixture(scope="module")
def missing_at_rank_1(tmp_path_factory) -> Launched:
    return Launched(tmp_path_factory.mktemp("resumed"), "distributed.faulty_runs.missing_at_rank_1")


def assert_together(left, right):
    """Both ranks hold the same weights after every step."""
    assert len(left["trajectory"]) == 6
    assert torch.equal(left["trajectory"], right["trajectory"])
    assert torch.isfinite(left["trajectory"]).all()


@pytest.mark.parametrize("name", faulty_runs.missing_everywhere())
def test_ranks_stay_together_without_the_state(missing_everywhere, name):
    assert_together(missing_everywhere(name, 0), missing_everywhere(name, 1))


@pytest.mark.parametrize("name", faulty_runs.missing_at_rank_0())
def test_ranks_stay_together_without_the_state_of_rank_0(missing_at_rank_0, name):
    assert_together(missing_at_rank_0(name, 0), missing_at_rank_0(name, 1))


@pytest.mark.parametrize("name", faulty_runs.missing_at_rank_1())
def test_ranks_stay_together_without_the_state_of_rank_1(missing_at_rank_1, name):
    assert_together(missing_at_rank_1(name, 0), missing_at_rank_1(name, 1))


@pytest.mark.slow
@pytest.mark.parametrize("table", ["looksam_device", "carried_device", "carried_global", "previous", "friendly_device"])
def test_ranks_that_resume_from_folders_of_their_own_stay_together(table, tmp_path):
    """The folder of one of them holds no state: it was on another machine's disk."""
    launched = Launched(tmp_path, f"distributed.faulty_runs.{table}")
    assert_together(launched("apart", 0), launched("apart", 1))


# --- gradients in DDP's buckets ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def buckets(tmp_path_factory) -> Launched:
    return Launched(tmp_path_factory.mktemp("buckets"), "distributed.faulty_runs.bucket_runs")


@pytest.mark.parametrize("group", faulty_runs.bucket_groups())
def test_views_into_ddps_buckets_change_no_run(buckets, group):
    for rank in (0, 1):
        found, plain = buckets(f"{group} views", rank), buckets(f"{group} no views", rank)
        torch.testing.assert_close(found["trajectory"], plain["trajectory"], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", faulty_runs.bucket_runs())
def test_weights_are_restored_exactly_beside_ddps_buckets(buckets, name):
    for rank in (0, 1):
        found = buckets(name, rank)
        assert all(torch.equal(weights, found["before"]) for weights in found["still"])


# --- several types -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def types(tmp_path_factory) -> Launched:
    return Launched(tmp_path_factory.mktemp("types"), "distributed.faulty_runs.type_runs")


def order_of_types(collectives) -> list[str]:
    """Of the gradients that are averaged; beside them at most one flag for each of the six parameters is reduced."""
    return list(dict.fromkeys(dtype for dtype, size in collectives if "float" in dtype and size not in (1, 6)))


@pytest.mark.parametrize("method", ["gsam", "wsam", "looksam"])
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: " ".join(str(t).removeprefix("torch.") for t in order))
def test_ranks_reduce_the_same_buffers_in_the_same_order(types, method, order):
    name = f"{method} {' '.join(str(t) for t in order)}"
    left, right = types(name, 0), types(name, 1)
    assert left["collectives"] == right["collectives"]
    assert torch.equal(left["trajectory"], right["trajectory"])
    assert torch.isfinite(left["trajectory"]).all()


@pytest.mark.parametrize("method", ["gsam", "wsam"])
def test_the_order_of_types_is_a_rule(types, method):
    """That of the parameters, or of the types' names: not that of a set, which may be another in each process."""
    found = {}
    for order in ORDERS:
        run = types(f"{method} {' '.join(str(t) for t in order)}")
        found[order] = order_of_types(run["collectives"])
    by_parameter = all(found[order] == [str(t) for t in order] for order in ORDERS)
    from_the_end = all(found[order] == [str(t) for t in reversed(order)] for order in ORDERS)
    by_name = all(found[order] == sorted(str(t) for t in order) for order in ORDERS)
    assert by_parameter or from_the_end or by_name, found


@pytest.mark.slow
def test_averaging_makes_no_copy_of_all_gradients(tmp_path):
    """The largest buffer that is reduced stays within 64 MB, of the 96 MB of this model's gradients."""
    launched = Launched(tmp_path, "distributed.faulty_runs.large_run")
    left, right = launched("large", 0), launched("large", 1)
    assert left["sum"] == right["sum"]
    assert 4 * left["parameters"] > 90 * 2**20
    assert max(size for _, size in left["collectives"]) * 4 <= 64 * 2**20
