import pytest
import torch
from transformers import TrainerCallback
from transformers.utils import logging

from hf_sam.baselines.averaging import WeightAveraging


class Trace(TrainerCallback):
    """The weights after every step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(model.classifier.weight.detach().double().clone())


def train(make_trainer, averaging, **arguments):
    trainer = make_trainer(max_steps=8, learning_rate=0.1, **arguments)
    trace = Trace()
    trainer.add_callback(trace)
    trainer.add_callback(averaging)
    trainer.train()
    return trainer.model.classifier.weight.detach().double(), trace.weights


def test_swa_is_the_mean_of_the_last_part(make_trainer):
    final, weights = train(make_trainer, WeightAveraging("swa", start=0.5))
    assert torch.allclose(final, torch.stack(weights[4:]).mean(0), atol=1e-6)
    assert not torch.allclose(final, weights[-1], atol=1e-4)


def test_ema_is_the_recursion(make_trainer):
    final, weights = train(make_trainer, WeightAveraging("ema", decay=0.8))
    expected = weights[0]
    for weight in weights[1:]:
        expected = 0.8 * expected + 0.2 * weight
    assert torch.allclose(final, expected, atol=1e-6)


def test_training_itself_is_untouched(make_trainer):
    _, with_average = train(make_trainer, WeightAveraging("ema"))
    trainer = make_trainer(max_steps=8, learning_rate=0.1)
    trace = Trace()
    trainer.add_callback(trace)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(with_average, trace.weights, strict=True))


@pytest.mark.parametrize("kind", ["swa", "ema"])
@pytest.mark.parametrize("is_in_arguments", [True, False])
def test_a_resumed_average_is_the_uninterrupted_one(make_trainer, tmp_path, kind, is_in_arguments):
    def averaging():
        return WeightAveraging(kind, start=0.25, decay=0.8)

    saving = {"save_strategy": "steps", "save_steps": 4}
    whole, _ = train(make_trainer, averaging(), **saving)
    trainer = make_trainer(max_steps=8, learning_rate=0.1, **saving)
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    trainer.args.resume_from_checkpoint = checkpoint if is_in_arguments else None
    trainer.add_callback(averaging())
    trainer.train(resume_from_checkpoint=checkpoint)
    assert torch.equal(trainer.model.classifier.weight.detach().double(), whole)


def test_an_average_that_is_not_in_the_checkpoint_starts_anew_with_a_warning(make_trainer, tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(max_steps=4, **saving).train()
    trainer = make_trainer(max_steps=8, **saving)
    trainer.add_callback(WeightAveraging("ema"))
    logging.enable_propagation()
    try:
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    finally:
        logging.disable_propagation()
    assert "averaged_weights.safetensors is not in the checkpoint: it starts anew" in caplog.text


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_a_run_that_stops_before_the_average_begins_keeps_its_weights(make_trainer):
    trainer = make_trainer(max_steps=8)
    trainer.add_callback(WeightAveraging("swa", start=0.5))
    trace = Trace()
    trainer.add_callback(trace)
    trainer.add_callback(Stop())
    trainer.train()
    assert torch.equal(trainer.model.classifier.weight.detach().double(), trace.weights[0])


@pytest.mark.parametrize(("arguments", "message"), [(("mean",), "average='mean'"), (("swa", 1.0), "average_start=1.0")])
def test_wrong_settings_are_a_message(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightAveraging(*arguments)
