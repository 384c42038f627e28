"""A `compute_loss` of one's own, a model that was compiled before, and hooks that have to be gone."""

from __future__ import annotations

import copy

import pytest
import torch
from integration import tiny
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sam import SAMConfig, SAMTrainer

# PEFT still reads the name that transformers has given up.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # in Inductor
]
METHODS = ("sam", "gsam", "functional", "esam")

# --- compute_loss --------------------------------------------------------------------------------------------------


class Keywords(tiny.WatchedSAMTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)


class Positions(tiny.WatchedSAMTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class Outputs(tiny.WatchedSAMTrainer):
    """Asks for the outputs, as one that adds a term to the loss does."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        assert outputs["logits"] is not None
        return (loss, outputs) if return_outputs else loss


class OutputsByKeyword(tiny.WatchedSAMTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(
            model, inputs=inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        assert outputs["logits"] is not None
        return (loss, outputs) if return_outputs else loss


def trained_as(cls, method, folder, **sam):
    """A causal language model, whose loss needs the number of labelled items."""
    tiny.set_seed(2)
    trainer = cls(
        model=tiny.llama(),
        args=tiny.arguments(folder, gradient_accumulation_steps=2, optim="sgd", learning_rate=0.1),
        train_dataset=tiny.texts(),
        sam_config=SAMConfig(method=method, rho=0.1, **sam),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cls", [Keywords, Positions, Outputs, OutputsByKeyword])
def test_arguments_reach_the_trainers_compute_loss(cls, method, tmp_path):
    plain = trained_as(tiny.WatchedSAMTrainer, method, tmp_path)
    ours = trained_as(cls, method, tmp_path)
    assert torch.equal(torch.stack(ours.trajectory), torch.stack(plain.trajectory))
    assert tiny.logged(ours, "loss") == tiny.logged(plain, "loss")


class Penalised(tiny.WatchedSAMTrainer):
    """A term of one's own on the logits: both passes have to see it."""

    weight = 1.0

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, True, *args[1:], **kwargs_without_outputs(kwargs))
        return loss + self.weight * outputs["logits"].square().mean()


def kwargs_without_outputs(kwargs):
    return {name: value for name, value in kwargs.items() if name != "return_outputs"}


def test_a_penalty_on_the_outputs_changes_the_run(tmp_path):
    with_penalty = trained_as(Penalised, "sam", tmp_path)
    plain = trained_as(tiny.WatchedSAMTrainer, "sam", tmp_path)
    assert not torch.equal(with_penalty.trajectory[0], plain.trajectory[0])


def test_a_mean_beside_a_sum_over_tokens_is_refused_where_parts_are_taken(tmp_path):
    """The losses of the parts do not add up to that of the batch in any one way."""
    with pytest.raises(ValueError, match="do not combine to that of the batch"):
        trained_as(Penalised, "esam", tmp_path)


class KeepsACopy(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.best = copy.deepcopy(model)


@pytest.mark.parametrize("sam", [{}, {"m": 2}, {"method": "functional"}, {"method": "esam"}], ids=str)
def test_the_model_can_be_copied_during_training(sam, tmp_path):
    extra = {"callbacks": [KeepsACopy()]}
    trainer = tiny.trained(tiny.llama(), tiny.texts(), tmp_path, SAMConfig(**sam), extra=extra)
    assert torch.equal(tiny.flat(extra["callbacks"][0].best), tiny.flat(trainer.model))


class WithTeacher(tiny.WatchedSAMTrainer):
    """Copies the model in its first pass, and runs the copy after the model."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not hasattr(self, "teacher"):
            self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        with torch.no_grad():
            self.teacher(**inputs)
        return loss


@pytest.mark.parametrize("method", METHODS)
def test_a_teacher_that_is_a_copy_of_the_model_is_not_taken_for_it(method, tmp_path):
    plain, ours = (trained_as(cls, method, tmp_path) for cls in (tiny.WatchedSAMTrainer, WithTeacher))
    assert torch.equal(torch.stack(ours.trajectory), torch.stack(plain.trajectory))
    tokens = torch.tensor([[3, 4]])
    assert ours.teacher.generate(tokens, max_new_tokens=1, do_sample=False).shape == (
        1,
        3,
    )  # refused for the model only


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", [True, False])
def test_the_result_has_the_form_that_was_asked_for_outside_training(method, wanted, tmp_path):
    trainer = trained_as(Positions, method, tmp_path)
    inputs = trainer.data_collator(tiny.texts(4))
    for found in (
        trainer.compute_loss(trainer.model, inputs, wanted),
        trainer.compute_loss(trainer.model, inputs, return_outputs=wanted),
    ):
        assert isinstance(found, tuple) == wanted


# --- a model that the user has compiled ----------------------------------------------------------------------------


def by_function(model, **how):
    return torch.compile(model, **how)


def by_method(model, **how):
    model.compile(**how)
    return model


def by_layer(model, **how):
    model.first = torch.compile(model.first, **how)
    return model


def by_method_of_a_layer(model, **how):
    model.first.compile(**how)
    return model


def start(model, folder, monkeypatch, device, sam=None):
    """Construct the trainer and begin to train, as on a machine with this device; nothing is moved or compiled."""

    class Stays(SAMTrainer):
        def _move_model_to_device(self, *args, **kwargs):
            pass

        def training_step(self, *args, **kwargs):
            raise InterruptedError("training has begun")

    trainer = Stays(model, tiny.arguments(folder), train_dataset=tiny.vectors(), sam_config=sam or SAMConfig())
    monkeypatch.setattr(TrainingArguments, "device", torch.device(device))
    Stays(model, trainer.args, train_dataset=tiny.vectors(), sam_config=sam or SAMConfig())


GRAPHS = [
    {"mode": "reduce-overhead"},
    {"mode": "max-autotune"},
    {"options": {"triton.cudagraphs": True}},
]
NO_GRAPHS = [{}, {"mode": "default"}, {"mode": "max-autotune-no-cudagraphs"}, {"backend": "eager"}]
COMPILERS = [by_function, by_method, by_layer, by_method_of_a_layer]


@pytest.mark.parametrize("how", GRAPHS, ids=str)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_model_that_replays_cuda_graphs_is_refused(compiler, how, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="CUDA graphs"):
        start(compiler(tiny.mlp(), **how), tmp_path, monkeypatch, "cuda")


@pytest.mark.parametrize("compiler", [by_function, by_layer])
def test_the_backend_that_does_nothing_else_is_refused(compiler, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="CUDA graphs"):
        start(compiler(tiny.mlp(), backend="cudagraphs"), tmp_path, monkeypatch, "cuda")


@pytest.mark.parametrize("how", NO_GRAPHS, ids=str)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_other_compiled_models_are_not_refused(compiler, how, tmp_path, monkeypatch):
    start(compiler(tiny.mlp(), **how), tmp_path, monkeypatch, "cuda")


@pytest.mark.parametrize("compiler", COMPILERS)
def test_on_the_cpu_there_are_no_cuda_graphs(compiler, tmp_path, monkeypatch):
    start(compiler(tiny.mlp(), mode="reduce-overhead"), tmp_path, monkeypatch, "cpu")


def test_without_sam_nothing_is_refused(tmp_path, monkeypatch):
    start(by_function(tiny.mlp(), mode="reduce-overhead"), tmp_path, monkeypatch, "cuda", SAMConfig(rho=0))


# --- Bi-LoRA's hooks -----------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Interrupting(TrainerCallback):
    def __init__(self, event, error):
        self._event, self._error = event, error

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "_event"):
            return self._raise
        return object.__getattribute__(self, name)

    def _raise(self, args, state, control, **kwargs):
        if state.global_step >= 1:
            raise self._error


class Breaking(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        if i == 9:
            raise OSError("the file is gone")
        return tiny.sentences()[i]


def bilora(folder, data=None, callbacks=(), **args):
    model = tiny.with_lora(tiny.bert(), ["query", "value"])
    before = hooks(model)
    trainer = SAMTrainer(
        model,
        tiny.arguments(folder, **args),
        train_dataset=tiny.sentences() if data is None else data,
        sam_config=SAMConfig(method="bilora", rho=0.1),
        callbacks=list(callbacks),
    )
    return trainer, model, before


def test_hooks_are_gone_after_training(tmp_path):
    trainer, model, before = bilora(tmp_path)
    trainer.train()
    assert hooks(model) == before


@pytest.mark.parametrize("event", ["on_step_end", "on_step_begin", "on_log", "on_epoch_end"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no space left")], ids=repr)
def test_hooks_are_gone_after_an_interruption(event, error, tmp_path):
    trainer, model, before = bilora(tmp_path, callbacks=[Interrupting(event, error)])
    with pytest.raises(type(error)):
        trainer.train()
    assert hooks(model) == before


def test_hooks_are_gone_after_an_error_in_the_data(tmp_path):
    trainer, model, before = bilora(tmp_path, Breaking())
    with pytest.raises(OSError, match="gone"):
        trainer.train()
    assert hooks(model) == before


def test_hooks_are_gone_after_an_error_in_the_model(tmp_path):
    trainer, model, before = bilora(tmp_path)
    handle = model.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("a kernel failed")))
    with pytest.raises(RuntimeError, match="kernel"):
        trainer.train()
    handle.remove()
    assert hooks(model) == before


def test_an_interrupted_run_can_be_started_again(tmp_path):
    trainer, model, before = bilora(tmp_path, callbacks=[Interrupting("on_step_end", KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = Trainer(model, tiny.arguments(tmp_path), train_dataset=tiny.sentences())
    again.train()  # a stock run on the same model is a stock run
    assert hooks(model) == before
