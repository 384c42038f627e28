import pytest
import torch

from hf_sam.update.batches import MicroBatch


def batch(**kwargs):
    inputs = {"x": torch.arange(10).reshape(5, 2), "labels": torch.tensor([0, 1, -100, 2, 2]), "names": list("abcde")}
    return MicroBatch({**inputs, **kwargs}, num_items_in_batch=8, accumulation_steps=2)


def test_parts_cover_the_batch_and_their_losses_add_up():
    parts = batch().split(2)
    assert [part.inputs["x"].tolist() for part in parts] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]
    assert [part.inputs["names"] for part in parts] == [["a", "b"], ["c", "d"], ["e"]]
    assert [part.fraction for part in parts] == [0.4, 0.4, 0.2]
    # a mean over k of n examples divided by this is the part's share of the mean over n, divided by the real steps
    assert [part.accumulation_steps for part in parts] == pytest.approx([5, 5, 10])
    assert all(part.num_items_in_batch == 8 for part in parts)


def test_no_m_or_a_large_one_is_the_whole_batch():
    whole = batch()
    assert whole.split(None) == [whole]
    assert whole.split(5) == [whole]


def test_a_share_estimates_the_whole_loss():
    share = batch().share(0.5)
    assert share.inputs["labels"].tolist() == [0, 1, -100]
    assert share.accumulation_steps == 2
    assert share.num_items_in_batch == 8 * 2 / 4  # labelled items seen, out of those in the whole micro-batch
    assert share.fraction == 0.6


def test_samples_keep_the_order_given():
    sample = batch().sample(torch.tensor([1, 4]))
    assert sample.inputs["x"].tolist() == [[2, 3], [8, 9]]
    assert sample.inputs["names"] == ["b", "e"]


def test_values_of_another_length_are_passed_on():
    part = batch(scale=torch.tensor(3.0), grid=torch.zeros(7)).split(2)[0]
    assert part.inputs["scale"] == 3.0
    assert len(part.inputs["grid"]) == 7


def test_popping_from_fresh_inputs_leaves_the_batch_alone():
    whole = batch()
    whole.fresh_inputs().pop("labels")
    assert "labels" in whole.inputs
