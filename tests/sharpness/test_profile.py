"""Several measures at once, and the callback that takes them in a run that goes on as if nothing had happened."""

import json
import math

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_sam import SAMConfig, SAMTrainer
from hf_sam.sharpness import (
    Hessian,
    SharpnessCallback,
    SharpnessConfig,
    Subset,
    SubsetLoss,
    m_sharpness,
    measure,
    sam_sharpness,
    scalars,
)
from hf_sam.sharpness.profile import MEASURES

from . import toys
from .test_operators import dense

SMALL = {"lanczos_steps": 4, "lanczos_draws": 1, "points": 3, "directions": 1, "steps": 2, "draws": 2, "probes": 2}


def test_every_measure_gives_json_its_cost_and_the_numbers_of_the_functions():
    model, examples = toys.bert()
    loss = SubsetLoss(model, Subset(examples, toys.collate, batch_size=4))
    config = SharpnessConfig(measures=list(MEASURES), m=[1, 2], tolerance=1e-4, **SMALL)
    started = []
    results = measure(loss, config, started.append)
    assert started == list(results) == list(MEASURES)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    numbers = scalars(results)
    assert numbers["loss"] == pytest.approx(loss())
    assert numbers["sam_0.05"] == pytest.approx(sam_sharpness(loss, [0.05])[0.05])
    assert numbers["sam_adaptive_0.5"] == pytest.approx(sam_sharpness(loss, [0.5], adaptive=True)[0.5])
    assert numbers["m_2"] == pytest.approx(m_sharpness(loss, 2, 0.05))
    spectrum = torch.linalg.eigvalsh(dense(Hessian(loss)).double())
    assert numbers["lambda_1"] == pytest.approx(spectrum[-1].item(), rel=1e-3)
    assert numbers["lambda_1_over_5"] == pytest.approx((spectrum[-1] / spectrum[-5]).item(), rel=1e-2)
    assert numbers["lambda_min"] == pytest.approx(spectrum[0].item(), abs=1e-3 * spectrum[-1].item())
    assert results["slice_1d"]["losses"][0][1] == pytest.approx(loss()), "the middle of a slice is the checkpoint"
    assert results["sam"]["passes"] == {"forward": 7.0, "gradient": 1.0, "curvature": 0.0}
    assert results["m"]["passes"] == {"forward": 2.0, "gradient": 2.0, "curvature": 0.0}
    assert results["density"]["passes"]["curvature"] == 4
    assert all(result["seconds"] > 0 for result in results.values())


def test_a_single_draw_is_no_reason_for_a_nan_in_json():
    model, examples = toys.normed_net()
    loss = SubsetLoss(model, Subset(examples, toys.collate))
    results = measure(loss, SharpnessConfig(measures=["average", "density"], draws=1, lanczos_draws=1))
    assert results["average"]["plain"]["standard_error"] is None
    json.dumps(results, allow_nan=False)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("measures", ["sam", "flatness"], "flatness.*Allowed: sam"),
        ("rho", [0.05, 0.0], "rho=0.0 must be a number above 0"),
        ("radius", math.inf, "radius=inf"),
        ("m", [0], "m=0 must be a whole number"),
        ("tolerance", 1.0, "tolerance=1.0"),
        ("weight_decay", -1.0, "weight_decay=-1.0"),
    ],
)
def test_a_number_out_of_range_is_named(field, value, words):
    with pytest.raises(ValueError, match=words):
        SharpnessConfig(**{field: value})


# --- the callback --------------------------------------------------------------------------------------------------


def run(folder, trainer_class, dtype: str, callback: bool, **options):
    """Two epochs of a tiny BERT with dropout, logged and saved; returns the trainer."""
    torch.manual_seed(0)
    model, examples = toys.bert()
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        num_train_epochs=2,
        logging_steps=2,
        learning_rate=0.01,
        save_steps=6,
        bf16=dtype == "bf16",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=5,
    )
    trainer = trainer_class(model=model, args=args, train_dataset=examples, data_collator=toys.collate, **options)
    if callback:
        config = SharpnessConfig(measures=["sam", "m", "hessian", "average"], m=[2], eigenvalues=2, **SMALL)
        trainer.add_callback(SharpnessCallback(trainer, config, num_examples=5, every=4))
    trainer.train()
    return trainer


def own_entries(trainer) -> list[dict]:
    """What the Trainer logged by itself, without what a clock measured."""
    entries = [e for e in trainer.state.log_history if not any(key.startswith("sharpness/") for key in e)]
    timed = ("sam_cost", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{key: value for key, value in entry.items() if key not in timed} for entry in entries]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("trainer_class", "options"),
    [(Trainer, {}), (SAMTrainer, {"sam_config": SAMConfig(rho=0.05)})],
    ids=["stock", "sam"],
)
def test_a_run_with_the_callback_is_bitwise_the_run_without_it(tmp_path, trainer_class, options, dtype):
    plain = run(tmp_path / "plain", trainer_class, dtype, callback=False, **options)
    measured = run(tmp_path / "measured", trainer_class, dtype, callback=True, **options)
    for a, b in zip(plain.model.parameters(), measured.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert own_entries(plain) == own_entries(measured)
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        a, b = (
            torch.load(tmp_path / name / "checkpoint-8" / file, weights_only=False) for name in ("plain", "measured")
        )
        toys.assert_same(a, b)
    logged = [entry for entry in measured.state.log_history if "sharpness/loss" in entry]
    assert [entry["step"] for entry in logged] == [0, 4, 8]
    assert all(entry["sharpness/sam_0.05"] > 0 for entry in logged)
    assert {"sharpness/lambda_1", "sharpness/m_2", "sharpness/average"} <= logged[0].keys()


def test_what_the_callback_logs_is_the_sharpness_of_the_model_at_that_step(tmp_path):
    trainer = run(tmp_path, Trainer, "fp32", callback=True)
    _, examples = toys.bert()
    subset = Subset.of(examples, trainer.model, 5, data_collator=toys.collate)
    expected = sam_sharpness(SubsetLoss(trainer.model, subset), [0.05])[0.05]
    last = [entry for entry in trainer.state.log_history if "sharpness/loss" in entry][-1]
    assert last["step"] == trainer.state.global_step
    assert last["sharpness/sam_0.05"] == pytest.approx(expected, rel=1e-5)


def test_a_callback_that_would_never_measure_is_refused():
    with pytest.raises(ValueError, match="every=0"):
        SharpnessCallback(trainer=None, every=0)
