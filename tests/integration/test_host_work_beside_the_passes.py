"""How many Python functions a step calls beside its passes: as many for a deep model as for a shallow one."""

from __future__ import annotations

import sys

import pytest
from integration import tiny
from integration.counting import Tower
from torch import nn
from transformers import Trainer, ViTConfig, ViTForImageClassification

from hf_sam import SAMConfig, SAMTrainer
from hf_sam.update import step

STEPS, SETTLED = 7, 4  # the first steps watch what a pass changes
# The most Python functions in a step that does not log, in a model of any number of tensors, and how many more each tensor
# may add: one is the hash of a parameter, where a gradient is found by it.
MOST = {
    "sam": (600, 1),
    "asam": (700, 1),
    "gsam": (900, 5),
    "msam": (360, 5),
    "periodic": (610, 1),
    "norm-only": (630, 3),
}
FIELDS = {"periodic": {"interval": 2}}


def calls_of(config: SAMConfig, model: nn.Module, data, folder, monkeypatch) -> list[int]:
    """Calls of Python functions in each settled step, without what the stock Trainer does in its passes."""
    counts, passes = [0], [0]

    def count(frame, event, argument):
        counts[-1] += event == "call" and not passes[0]

    stock, ours = Trainer.training_step, SAMTrainer.training_step

    def one_pass(self, *args, **kwargs):
        passes[0] += 1
        try:
            return stock(self, *args, **kwargs)
        finally:
            passes[0] -= 1

    def counted(self, *args, **kwargs):
        counts.append(0)
        sys.setprofile(count)
        try:
            return ours(self, *args, **kwargs)
        finally:
            sys.setprofile(None)

    tiny.set_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", one_pass)
        patch.setattr(SAMTrainer, "training_step", counted)
        SAMTrainer(
            model=model,
            args=tiny.arguments(folder, max_steps=STEPS, logging_steps=100),
            train_dataset=data,
            sam_config=config,
        ).train()
    return counts[1 + SETTLED : -1]  # the last step measures what is logged at the end


@pytest.fixture(autouse=True)
def whole_lists(monkeypatch):
    monkeypatch.setattr(step, "IN_BUCKETS", True)


@pytest.mark.parametrize("method", MOST)
def test_python_functions_do_not_grow_with_the_number_of_tensors(method, tmp_path, monkeypatch):
    config = SAMConfig(method=method, **FIELDS.get(method, {}))
    few, many = (
        max(calls_of(config, Tower(tensors // 4), tiny.vectors(), tmp_path, monkeypatch)) for tensors in (20, 200)
    )
    most, per_tensor = MOST[method]
    assert few <= most
    assert many - few <= per_tensor * 180


def test_nor_with_the_number_of_modules_of_classes_beside_torchs(tmp_path, monkeypatch):
    """Their attributes are compared before and after every pass."""
    counts, tensors = [], []
    for layers in (1, 6):
        settings = tiny.vit().config.to_dict() | {"num_hidden_layers": layers}
        model = ViTForImageClassification(ViTConfig(**settings))
        tensors.append(len(list(model.parameters())))
        counts.append(max(calls_of(SAMConfig(), model, tiny.images(), tmp_path, monkeypatch)))
    assert counts[1] - counts[0] <= tensors[1] - tensors[0]


def test_without_a_perturbation_a_step_calls_one_function_more_than_the_stock_trainers(tmp_path, monkeypatch):
    counts = calls_of(SAMConfig(rho=0), Tower(5), tiny.vectors(), tmp_path, monkeypatch)
    assert set(counts) == {2}  # ours, and the stock one as wrapped here
