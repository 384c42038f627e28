"""TRL's trainers with the mixin: at a vanishing perturbation their run, at any their metrics of the clean pass."""

from __future__ import annotations

import importlib

import pytest
from datasets import Dataset
from peft import LoraConfig
from zoo import kit, words

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
LORA = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "lora_dropout": 0.1}


def plain() -> Dataset:
    return Dataset.from_list([{"text": words.sentence(i, 4 + i % 5)} for i in range(12)])


def completed() -> Dataset:
    return Dataset.from_list(
        [{"prompt": words.sentence(i, 3), "completion": " " + words.sentence(i + 50, 2 + i % 4)} for i in range(12)]
    )


def preferred() -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": words.sentence(i, 3),
                "chosen": " " + words.sentence(i + 50, 2 + i % 3),
                "rejected": " " + words.sentence(i + 90, 3),
            }
            for i in range(12)
        ]
    )


def triples() -> Dataset:
    return preferred().map(lambda row: {"reference": " " + words.sentence(7, 3)})


def judged() -> Dataset:
    return completed().map(lambda row, i: {"label": i % 3 != 0}, with_indices=True)


def conversations() -> Dataset:
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": words.sentence(i, 3)},
                    {"role": "assistant", "content": words.sentence(i + 50, 4)},
                ]
            }
            for i in range(12)
        ]
    )


# By name: where the trainer lives, its name, data, arguments of its configuration, of the trainer.
TRAINERS = {
    "SFT": ("trl", "SFT", plain, {}, {}),
    "SFT, completions": ("trl", "SFT", completed, {"completion_only_loss": True}, {}),
    "SFT, packed": ("trl", "SFT", plain, {"packing": True, "packing_strategy": "wrapped"}, {}),
    "SFT, without padding": ("trl", "SFT", plain, {"padding_free": True, "max_length": None}, {}),
    "SFT, DFT loss": ("trl", "SFT", plain, {"loss_type": "dft"}, {}),
    "SFT, cross entropy": ("trl", "SFT", plain, {"loss_type": "nll"}, {}),
    "SFT, embeddings with noise": ("trl", "SFT", plain, {"neftune_noise_alpha": 5.0}, {}),
    "SFT, LoRA": ("trl", "SFT", plain, {}, {"peft_config": LORA}),
    "DPO": ("trl", "DPO", preferred, {}, {}),
    "DPO, IPO": ("trl", "DPO", preferred, {"loss_type": "ipo"}, {}),
    "DPO, reference that follows": (
        "trl",
        "DPO",
        preferred,
        {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
        {},
    ),
    "DPO, log-probabilities in advance": ("trl", "DPO", preferred, {"precompute_ref_log_probs": True}, {}),
    "DPO, LoRA": ("trl", "DPO", preferred, {}, {"peft_config": LORA}),
    "KTO": ("trl", "KTO", judged, {}, {}),
    "reward": ("trl", "Reward", preferred, {}, {}),
    "reward, centred": ("trl", "Reward", preferred, {"center_rewards_coefficient": 0.01}, {}),
    "ORPO": ("trl.experimental.orpo", "ORPO", preferred, {"max_length": 16}, {}),
    "CPO": ("trl.experimental.cpo", "CPO", preferred, {"max_length": 16}, {}),
    "CPO, SimPO": ("trl.experimental.cpo", "CPO", preferred, {"loss_type": "simpo", "cpo_alpha": 0.0}, {}),
    "GKD": ("trl.experimental.gkd", "GKD", conversations, {"lmbda": 0.0}, {}),
    "TPO": ("trl.experimental.tpo", "TPO", triples, {}, {}),
}
QUICK = {"SFT, packed", "SFT, completions", "DPO", "KTO", "reward", "ORPO", "CPO"}
# Their gradient is the perturbed pass's.
OF_THE_STEP = {"grad_norm"}


def builder(name, tmp_path, **overrides):
    module, kind, data, options, extra = TRAINERS[name]
    module = importlib.import_module(module)
    stock = getattr(module, f"{kind}Trainer")

    def build(cls, **sam):
        arguments = {"learning_rate": 1e-3, "gradient_checkpointing": False, "max_length": 16, **options, **overrides}
        model = words.language_model() if kind != "Reward" else words.reward_model()
        return cls(
            model=model,
            args=kit.arguments(tmp_path, getattr(module, f"{kind}Config"), **arguments),
            train_dataset=data(),
            eval_dataset=data().select(range(4)),
            processing_class=words.tokenizer(),
            **({"peft_config": LoraConfig(**extra["peft_config"])} if extra else {}),
            **({"teacher_model": words.language_model()} if kind == "GKD" else {}),
            **({"ref_model": words.language_model()} if kind in ("DPO", "KTO") and not extra else {}),
            **sam,
        )

    return build, stock


@pytest.mark.parametrize(
    ("name", "micro_batches"),
    [
        pytest.param(name, count, marks=[] if name in QUICK and count == 1 else pytest.mark.slow)
        for name in TRAINERS
        for count in (1, 2)
    ],
)
def test_the_run(name, micro_batches, tmp_path):
    build, stock = builder(name, tmp_path, gradient_accumulation_steps=micro_batches)
    kit.assert_same_as_stock(build, stock)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in TRAINERS]
)
def test_metrics_of_the_clean_pass(name, tmp_path):
    """Under a perturbation that matters the first step's metrics are still the stock trainer's."""
    build, stock = builder(name, tmp_path, gradient_accumulation_steps=2, max_steps=1, eval_strategy="no")
    kit.assert_first_entry_is_the_stock_trainers(build, stock, but=OF_THE_STEP)
