"""Whatever ends a pass early, the weights and statistics are what they were, and a run can go on."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from integration import equivalence, tiny

from hf_sam import SAMConfig
from hf_sam.update.perturbation import Perturbation

SCOPES = ("micro", "device", "global")
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"


class Interrupted:
    """Raises in one forward or backward pass, counted from 0 over the run."""

    def interrupt(self, at: int, error: BaseException, where: str = "forward"):
        self._at, self._error, self._where = at, error, where
        return self

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if len(self.passes) - 1 == self._at:
            self.before = tiny.state(self.model)
            if self._where == "backward":
                loss.register_hook(self._raise)
            else:
                self._raise()
        return loss

    def _raise(self, *_):
        raise self._error


class InterruptedSAMTrainer(Interrupted, tiny.WatchedSAMTrainer):
    pass


def interrupted(tmp_path, sam: SAMConfig, model=None, **args) -> InterruptedSAMTrainer:
    tiny.set_seed(2)
    model = tiny.mlp(batch_norm=True, dropout=0.2) if model is None else model
    return InterruptedSAMTrainer(
        model=model, args=tiny.arguments(tmp_path, **args), train_dataset=tiny.vectors(), sam_config=sam
    )


@pytest.mark.parametrize(
    ("error", "where"),
    [(RuntimeError("a kernel failed"), "forward"), (KeyboardInterrupt(), "backward")],
    ids=["error", "ctrl-c"],
)
@pytest.mark.parametrize(("scope", "accumulation"), list(itertools.product(SCOPES, (1, 2))))
def test_an_exception_in_any_pass_leaves_weights_and_statistics(scope, accumulation, error, where, tmp_path):
    """Step 1 is interrupted in each of its passes, clean and perturbed, of every micro-batch."""
    sam = SAMConfig(rho=0.5, scope=scope)
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 2}
    whole = interrupted(tmp_path, sam, **options).interrupt(-1, error)
    whole.train()
    start = whole.trajectory[0]
    per_step = 2 * accumulation
    perturbed_passes = 0
    for position in range(per_step):
        trainer = interrupted(tmp_path, sam, **options).interrupt(per_step + position, error, where)
        with pytest.raises(type(error)):
            trainer.train()
        assert torch.equal(tiny.flat(trainer.model), start)
        _, weights = trainer.passes[-1]
        perturbed_passes += not torch.equal(weights, start)
        clean_passes = accumulation + (position // 2 + 1 if scope == "micro" else min(position + 1, accumulation))
        assert trainer.model.norm.num_batches_tracked == clean_passes
    assert perturbed_passes == accumulation


@pytest.mark.parametrize("method", [{"p": 1}, {"p": "inf"}, {"method": "asam"}, {"ascent_steps": 3}])
def test_an_exception_leaves_the_weights_for_every_ascent(method, tmp_path):
    sam = SAMConfig(rho=0.5, **method)
    passes = 1 + sam.ascent_steps
    for position in range(passes):
        trainer = interrupted(tmp_path, sam, max_steps=2).interrupt(passes + position, RuntimeError("no"))
        with pytest.raises(RuntimeError, match="no"):
            trainer.train()
        assert torch.equal(tiny.flat(trainer.model), trainer.trajectory[0])


def test_ctrl_c_while_the_weights_are_put_back(tmp_path, monkeypatch):
    """A second signal at each line that the restore executes, one line a run."""
    leave, code_of = Perturbation.__exit__, Perturbation.__exit__.__code__.co_filename

    def leave_interrupted_at(position: int):
        def leave_and_interrupt(self, *exception):
            lines = itertools.count(1)

            def trace(frame, event, arg):
                if frame.f_code.co_filename == code_of and event == "line" and next(lines) == position:
                    sys.settrace(None)
                    raise KeyboardInterrupt
                return trace

            sys.settrace(trace)
            try:
                return leave(self, *exception)
            finally:
                sys.settrace(None)

        return leave_and_interrupt

    interruptions = 0
    for position in itertools.count(2):  # the first line only opens the `try`
        monkeypatch.setattr(Perturbation, "__exit__", leave_interrupted_at(position))
        trainer = tiny.trainer_for(tiny.mlp(), tiny.vectors(), tmp_path, SAMConfig(rho=0.5), max_steps=1)
        start = tiny.flat(trainer.model)
        try:
            trainer.train()
        except KeyboardInterrupt:
            interruptions += 1
            assert torch.equal(tiny.flat(trainer.model), start), f"line {position} of the restore"
        else:
            break
    assert interruptions >= 6 * 2  # two lines for each of the six parameters


@pytest.mark.parametrize("phase", ["clean", "perturbed"])
@pytest.mark.parametrize("scope", SCOPES)
def test_auto_find_batch_size_goes_on_after_running_out_of_memory(scope, phase, tmp_path):
    """The Trainer starts over with a smaller batch from the present weights, as a run of that size from the start."""

    class Small(tiny.WatchedSAMTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            is_perturbed = not torch.equal(self.passes[-1][1], start)
            if len(inputs["x"]) > 5 and is_perturbed == (phase == "perturbed"):
                raise RuntimeError(OUT_OF_MEMORY)
            return loss

    def run(trainer_class, **args):
        tiny.set_seed(2)
        trainer = trainer_class(
            model=tiny.mlp(),
            args=tiny.arguments(tmp_path, gradient_accumulation_steps=2, **args),
            train_dataset=tiny.vectors(),
            sam_config=SAMConfig(rho=0.5, scope=scope),
        )
        trainer.train()
        return trainer

    start = tiny.flat(tiny.mlp())
    found = run(Small, auto_find_batch_size=True, per_device_train_batch_size=6)
    assert found._train_batch_size == 5
    direct = run(tiny.WatchedSAMTrainer, per_device_train_batch_size=5)
    assert torch.equal(torch.stack(found.trajectory), torch.stack(direct.trajectory))


# --- killed and resumed --------------------------------------------------------------------------------------------

KILLED_RUN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from integration import equivalence, tiny
from integration.test_interruptions import killed_run_trainer

class Killed(tiny.WatchedSAMTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        if len(self.passes) == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

killed_run_trainer({folder!r}, {scope!r}, Killed).train()
"""


def killed_run_trainer(folder, scope: str, trainer_class=tiny.WatchedSAMTrainer, **args):
    """BERT with dropout, random order, a learning rate that changes, a checkpoint every two steps."""
    tiny.set_seed(2)
    defaults = {
        "max_steps": 7,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "random",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    return trainer_class(
        model=tiny.bert(dropout=0.2),
        args=tiny.arguments(folder, **{**defaults, **args}),
        train_dataset=tiny.sentences(20),
        sam_config=SAMConfig(rho=0.1, scope=scope, rho_schedule="linear", interval=2),
    )


@pytest.mark.parametrize(
    ("scope", "step"),
    [
        ("device", 4),
        *(pytest.param(s, k, marks=pytest.mark.slow) for s in ("micro", "device", "global") for k in (2, 6)),
    ],
)
def test_killed_at_any_moment_and_resumed_is_the_uninterrupted_run(scope, step, tmp_path):
    """The kill comes in the last perturbed pass of `step`."""
    whole = killed_run_trainer(tmp_path / "whole", scope, save_strategy="no")
    whole.train()
    at = 1 + max(i for i, (s, _) in enumerate(whole.passes) if s == step)
    folder = str(tmp_path / "killed")
    script = KILLED_RUN.format(tests=str(Path(__file__).parents[1]), at=at, folder=folder, scope=scope)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    resumed = killed_run_trainer(folder, scope)
    resumed.train(resume_from_checkpoint=True)
    assert len(resumed.trajectory) == 7 - step
    assert torch.equal(torch.stack(resumed.trajectory), torch.stack(whole.trajectory[step:]))
    tail = [entry for entry in whole.state.log_history if "loss" in entry and entry["step"] > step]
    assert [entry for entry in resumed.state.log_history if "loss" in entry and entry["step"] > step] == tail


class SkipsWhatFails:
    """Goes on with the next micro-batch after an error, as users do when one batch is too large."""

    lost = (1, 4)  # micro-batches

    def training_step(self, *args, **kwargs):
        self.micro = getattr(self, "micro", -1) + 1
        try:
            return super().training_step(*args, **kwargs)
        except RuntimeError:
            return torch.zeros(())

    def compute_loss(self, *args, **kwargs):
        if self.micro in self.lost:
            raise RuntimeError(OUT_OF_MEMORY)
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize(("scope", "accumulation"), [("device", 1), ("device", 2), ("micro", 2), ("device", 3)])
def test_a_micro_batch_that_user_code_skips_after_an_error_is_only_that_one(scope, accumulation, tmp_path):
    runs = equivalence.both(tmp_path, scope, accumulation, body=SkipsWhatFails, max_steps=4)
    equivalence.assert_like_stock(*runs, perturbs=False)


@pytest.mark.parametrize("scope", ["device", "micro"])
def test_steps_after_a_second_pass_that_user_code_skipped_are_ordinary_ones(scope, tmp_path):
    """The step itself has lost gradients; its window and its count of micro-batches must not enter the next one."""

    class Skips(tiny.WatchedSAMTrainer):
        def training_step(self, *args, **kwargs):
            try:
                return super().training_step(*args, **kwargs)
            except RuntimeError:
                return torch.zeros(())

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            # Passes of the first step: clean, clean, perturbed, perturbed; under "micro" clean, perturbed, and so on.
            if len(self.passes) == 4:
                raise RuntimeError(OUT_OF_MEMORY)
            return loss

    tiny.set_seed(2)
    args = tiny.arguments(tmp_path, gradient_accumulation_steps=2, learning_rate=0.0, optim="sgd")
    sam = SAMConfig(rho=0.1, scope=scope)
    skipping = Skips(model=tiny.mlp(), args=args, train_dataset=tiny.vectors(), sam_config=sam)
    skipping.train()
    whole = tiny.trained(
        tiny.mlp(), tiny.vectors(), tmp_path, sam, gradient_accumulation_steps=2, learning_rate=0.0, optim="sgd"
    )
    for key in ("grad_norm", "sam_perturbed_loss", "sam_ascent_grad_norm"):
        assert tiny.logged(skipping, key)[-2:] == tiny.logged(whole, key)[-2:], key
