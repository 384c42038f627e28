from types import SimpleNamespace

import pytest
import torch

from hf_sam.methods.base import Needs
from hf_sam.update.batches import LOSS_COMBINATIONS, ChangedInputs, MicroBatch, infer_loss_combination
from hf_sam.update.step import SharpnessAwareUpdate


def batch(**kwargs):
    inputs = {"x": torch.arange(10).reshape(5, 2), "labels": torch.tensor([0, 1, -100, 2, 2]), "names": list("abcde")}
    return MicroBatch({**inputs, **kwargs}, num_items_in_batch=8, accumulation_steps=2)


def parts_of(whole, m):
    return [whole.part(indices) for indices in whole.chunks(m)]


def tokens(lengths):
    """Five rows of labels, the first `lengths[i]` of row i labelled."""
    return torch.stack([torch.where(torch.arange(6) < n, 1, -100) for n in lengths])


def test_parts_cover_the_batch_and_their_losses_add_up():
    parts = parts_of(batch(), 2)
    assert [part.inputs["x"].tolist() for part in parts] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9]]]
    assert [part.inputs["names"] for part in parts] == [["a", "b"], ["c", "d"], ["e"]]
    assert [part.fraction for part in parts] == [0.4, 0.4, 0.2]
    # a mean over k of n examples, multiplied by this, is the part's share of the mean over n
    assert [part.weights["examples"] for part in parts] == pytest.approx([0.4, 0.4, 0.2])
    assert [part.weights["sum"] for part in parts] == [1.0, 1.0, 1.0]
    assert all(part.num_items_in_batch == 8 for part in parts)
    assert all(part.accumulation_steps == 2 for part in parts)


def test_a_mean_over_labelled_tokens_counts_in_proportion_to_them():
    lengths = [6, 1, 2, 3, 4]
    parts = parts_of(batch(labels=tokens(lengths)), 2)
    assert [float(part.weights["labelled"]) for part in parts] == pytest.approx([7 / 16, 5 / 16, 4 / 16])
    assert sum(float(part.weights["labelled"]) for part in parts) == pytest.approx(1)


def test_parts_of_parts_are_shares_of_the_whole():
    half = batch().part(torch.tensor([0, 1, 2, 3]))
    quarter = half.part(torch.tensor([2]))
    assert quarter.inputs["names"] == ["c"]
    assert quarter.fraction == pytest.approx(0.2)
    assert quarter.weights["examples"] == pytest.approx(0.2)


@pytest.mark.parametrize("m", [None, 5, 6])
def test_no_m_or_a_large_one_is_the_whole_batch(m):
    whole, seen = batch(), []
    update = SimpleNamespace(
        needs=Needs.GRADIENT,
        config=SimpleNamespace(m=m),
        _two_pass_step=lambda model, part, is_last: seen.append(part),
    )
    SharpnessAwareUpdate._sharpness_aware_step(update, None, whole, True)
    assert seen == [whole]
    if m is not None:
        (part,) = parts_of(whole, m)
        assert part.inputs["names"] == whole.inputs["names"]
        assert part.fraction == 1
        assert part.weights == dict.fromkeys(LOSS_COMBINATIONS, 1.0)


def test_a_share_estimates_the_whole_loss():
    share = batch().sample(torch.arange(3))
    assert share.inputs["labels"].tolist() == [0, 1, -100]
    assert share.accumulation_steps == 2
    assert share.fraction == 0.6
    assert share.weights["examples"] == share.weights["labelled"] == 1.0, "means are estimates as they are"
    assert share.num_items_in_batch == 8
    share = batch(labels=tokens([6, 1, 2, 3, 4])).sample(torch.arange(3))
    # a sum over labelled items is multiplied by those in the whole micro-batch, out of those seen
    assert float(share.weights["sum"]) == pytest.approx(16 / 9)


def test_a_sum_over_the_labelled_examples_of_a_share_estimates_the_whole_one():
    """Examples without a label (-100) are no items: two of the four that have one are seen."""
    assert float(batch().sample(torch.arange(3)).weights["sum"]) == pytest.approx(4 / 2)


def test_samples_keep_the_order_given():
    sample = batch().sample(torch.tensor([1, 4]))
    assert sample.inputs["x"].tolist() == [[2, 3], [8, 9]]
    assert sample.inputs["names"] == ["b", "e"]


def test_values_of_another_length_are_passed_on():
    part = parts_of(batch(scale=torch.tensor(3.0), grid=torch.zeros(7)), 2)[0]
    assert part.inputs["scale"] == 3.0
    assert len(part.inputs["grid"]) == 7


def test_popping_from_fresh_inputs_leaves_the_batch_alone():
    whole = batch()
    whole.fresh_inputs().pop("labels")
    assert "labels" in whole.inputs


def test_a_factor_multiplies_the_loss_however_it_adds_up():
    assert batch().times(2.0).weights == dict.fromkeys(LOSS_COMBINATIONS, 2.0)


def test_an_entry_that_is_not_the_models_is_left_out_of_a_copy():
    whole = batch()
    assert "names" not in whole.without("names").inputs
    assert "names" in whole.inputs
    assert whole.without(None) is whole


SHARES = {"sum": [1.0, 1.0], "examples": [0.5, 0.5], "labelled": [0.25, 0.75]}


@pytest.mark.parametrize("way", LOSS_COMBINATIONS)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_way_in_which_losses_add_up_is_found(way, sign):
    parts = [sign * 1.0, sign * 3.0]
    whole = sum(weight * loss for weight, loss in zip(SHARES[way], parts, strict=True))
    assert infer_loss_combination(whole, parts, SHARES, 1e-6) == way
    assert infer_loss_combination(whole * (1 + 1e-7), parts, SHARES, 1e-6) == way


@pytest.mark.parametrize("whole", [3.1, 0.0, float("nan")])
def test_losses_that_do_not_add_up_are_told(whole):
    assert infer_loss_combination(whole, [1.0, 3.0], SHARES, 1e-6) is None


# --- inputs that a pass changes -------------------------------------------------------------------------------------


def passes_that(change, rounds=3):
    """Batches of one layout, as clean passes leave them, and whether each one is whole again."""
    changed_inputs, found = ChangedInputs(), []
    for _ in range(rounds):
        whole = batch(pixels=torch.ones(5, 2))
        restore_inputs = changed_inputs.protect(whole)
        change(changed_inputs.protected(whole))
        found.append((whole, restore_inputs()))
    return changed_inputs, found


def double_pixels(inputs):
    inputs["pixels"].mul_(2)


def append_a_name(inputs):
    inputs["names"].append("f")


@pytest.mark.parametrize("change", [double_pixels, append_a_name, lambda inputs: inputs.pop("labels")])
def test_inputs_that_a_pass_has_changed_are_whole_again(change):
    _, found = passes_that(change)
    for whole, is_whole in found:
        assert is_whole
        assert torch.equal(whole.inputs["pixels"], torch.ones(5, 2))
        assert whole.inputs["names"] == list("abcde")
        assert "labels" in whole.inputs


def test_inputs_that_stay_as_they_are_are_not_copied_again():
    changed_inputs, found = passes_that(lambda inputs: None)
    assert all(is_whole for _, is_whole in found)
    whole = batch(pixels=torch.ones(5, 2))
    assert changed_inputs.protected(whole)["pixels"] is whole.inputs["pixels"]


def test_a_batch_that_is_changed_for_the_first_time_is_lost_and_the_next_one_is_not():
    changed_inputs, _ = passes_that(lambda inputs: None)
    outcomes = []
    for _ in range(2):
        whole = batch(pixels=torch.ones(5, 2))
        restore_inputs = changed_inputs.protect(whole)
        double_pixels(changed_inputs.protected(whole))
        outcomes.append((restore_inputs(), bool((whole.inputs["pixels"] == 1).all())))
    assert outcomes == [(False, False), (True, True)]
