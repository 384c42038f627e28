"""Each warning fires on numbers that should make it, once, and stays quiet on those of a run that is well."""

from __future__ import annotations

import logging

import pytest
import torch

from hf_sam import SAMConfig
from hf_sam.update.diagnosis import Diagnosis, logger

WELL = {"sam_rho": 0.05, "sam_perturbed_loss": 1.05, "sam_sharpness": 0.05, "_intended_norm": 0.05}
WELL |= {"sam_perturbation_norm": 0.05, "sam_share/embeddings": 0.4, "sam_share/head": 0.3}


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(logger, "warning", said.append)
    return said


def diagnosis(**options):
    defaults = {"computed_in": torch.float32, "group_sizes": {"embeddings": 0.5, "head": 0.01}}
    return Diagnosis(SAMConfig(rho=0.05), 200, **{**defaults, **options})


def run(entries, every=5, loss=2.0, **options):
    """Entries of a run that began at `loss`."""
    mine = diagnosis(**options)
    for i, means in enumerate(entries, 1):
        mine.check(means, loss, i * every)
    return mine


def with_loss(loss, sharpness, **more):
    return {**WELL, "sam_perturbed_loss": loss + sharpness, "sam_sharpness": sharpness, **more}


def test_a_run_that_is_well_is_left_alone(warnings):
    run([WELL] * 40).end(200, has_perturbed=True)
    assert warnings == []


def test_its_warnings_can_be_turned_off_like_those_of_any_module():
    assert isinstance(logger, logging.Logger)
    assert logger.name == "hf_sam.update.diagnosis"


TOO_LARGE = with_loss(1.5, 3.0)
TOO_SMALL = with_loss(1.5, 1e-7)
HEAD = {**WELL, "sam_share/head": 0.97}
EMBEDDINGS = {**WELL, "sam_share/embeddings": 0.97}
LEARNED = with_loss(0.002, 0.003)
LOST = {**WELL, "sam_perturbation_norm": 0.01}
ADDED = {**WELL, "sam_perturbation_norm": 0.08}
WRONG = {
    "rho too large": (TOO_LARGE, ("sam_sharpness=3 is 2 times the loss (1.5)", "rho=0.05 is too large: try rho=0.003")),
    "rho too small": (TOO_SMALL, ("sam_sharpness=1e-07", "float32", "rho=0.05 is too small", "Raise rho")),
    "head": (HEAD, ("97% of", "the head, which has only 1%", "perturb='no-embeddings-no-head'")),
    "embeddings": (EMBEDDINGS, ("97% of", "the embeddings, which have only 50%", "perturb='no-embeddings'")),
    "learned": (LEARNED, ("(0.002)", "(0.005)", "Set end=")),
    "rounded away": (LOST, ("loses", "sam_perturbation_norm=0.01 instead of 0.05", "stochastic_rounding=True")),
    "rounding adds": (ADDED, ("adds", "sam_perturbation_norm=0.08", "a larger rho")),
}


@pytest.mark.parametrize("every", [1, 5, 100])
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_told_once_with_the_number_and_the_remedy(kind, every, warnings):
    means, expected = WRONG[kind]
    run([means] * (max(20, 2 * every) // every), every)
    (message,) = warnings
    for part in expected:
        assert part in message


def test_another_run_is_told_again(warnings):
    for _ in range(2):
        run([TOO_LARGE] * 4)
    assert len(warnings) == 2


@pytest.mark.parametrize("kind", ["rho too large", "rho too small", "head", "embeddings", "learned"])
def test_what_passes_is_not_told(kind, warnings):
    """A fresh head has all of the gradient in the first step; one batch is harder than the next."""
    run([WRONG[kind][0], WELL, WRONG[kind][0], WELL] * 10)
    assert warnings == []


def test_a_small_loss_of_which_sharpness_is_a_multiple_is_no_fault(warnings):
    run([with_loss(0.04, 0.11)] * 10)
    assert warnings == []


def test_a_resumed_run_is_measured_against_where_it_began(warnings):
    run([with_loss(0.04, 0.11)] * 10, loss=0.04, first_loss=2.0)
    assert warnings == []


def test_a_group_that_is_most_of_what_is_perturbed_may_have_most_of_it(warnings):
    run([EMBEDDINGS] * 10, group_sizes={"embeddings": 1.0})
    assert warnings == []


@pytest.mark.parametrize(("dtype", "speaks"), [(torch.float32, False), (torch.bfloat16, True)])
def test_rounding_is_that_of_the_type_in_which_losses_are_computed(dtype, speaks, warnings):
    run([with_loss(1.5, 1e-4)] * 10, computed_in=dtype)
    assert bool(warnings) is speaks


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_numbers_that_mean_nothing_raise_no_alarm(value, warnings):
    run([dict.fromkeys(WELL, value)] * 10, loss=value)
    assert warnings == []


def test_entries_without_a_perturbed_step_say_nothing(warnings):
    run([{}] * 10)
    assert warnings == []


def test_a_run_that_never_was_perturbed(warnings):
    mine = Diagnosis(SAMConfig(start=0.75), 200, torch.float32)
    mine.end(0, has_perturbed=False)
    assert warnings == []
    mine.end(100, has_perturbed=False)
    (message,) = warnings
    for part in ("None of the 100 steps", "start=0.75", "200 steps were planned", "Lower start"):
        assert part in message
