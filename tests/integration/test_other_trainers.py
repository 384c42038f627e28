"""The mixin on trainers that are not ours: their runs, and their metrics of the clean pass alone."""

from __future__ import annotations

import pytest
import torch
from integration import tiny
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration, set_seed

from hf_sam import SAMConfig, SAMTrainerMixin

SCOPES = ("micro", "device", "global")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # theirs
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def common(tmp_path, **overrides) -> dict:
    return {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **overrides,
    }


class Tokens:
    """The least of a tokenizer that TRL asks for where the data is already token ids."""

    def __new__(cls):
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        vocabulary = {f"<{i}>": i for i in range(tiny.VOCABULARY)}
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<1>")),
            pad_token="<0>",
            bos_token="<1>",
            eos_token="<2>",
            unk_token="<1>",
        )


def compare(ours, stock, keys):
    """Bitwise the same weights under a vanishing rho, and the same metrics."""
    assert torch.equal(tiny.flat(ours.model), tiny.flat(stock.model))
    for key in keys:
        values = tiny.logged(stock, key)
        assert len(values) == 3, key
        assert tiny.logged(ours, key) == values, key


# --- TRL -----------------------------------------------------------------------------------------------------------


def sft(tmp_path, sam: SAMConfig | None, *, lora: bool = False):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    class SAMSFT(SAMTrainerMixin, SFTTrainer):
        pass

    data = Dataset.from_list(
        [{"input_ids": row["input_ids"].tolist()[: 4 + i % 5]} for i, row in enumerate(tiny.texts())]
    )
    model = tiny.llama()
    set_seed(0)
    kwargs = {
        "model": model,
        "args": SFTConfig(**common(tmp_path, max_length=16)),
        "train_dataset": data,
        "processing_class": Tokens(),
        "peft_config": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False) if lora else None,
    }
    trainer = SFTTrainer(**kwargs) if sam is None else SAMSFT(sam_config=sam, **kwargs)
    trainer.train()
    return trainer


SFT_METRICS = ("loss", "grad_norm", "num_tokens", "mean_token_accuracy", "entropy")


@pytest.mark.parametrize("scope", SCOPES)
def test_supervised_fine_tuning(scope, tmp_path):
    compare(sft(tmp_path, SAMConfig(rho=1e-30, scope=scope)), sft(tmp_path, None), SFT_METRICS)


def test_supervised_fine_tuning_with_an_adapter(tmp_path):
    ours, stock = sft(tmp_path, SAMConfig(rho=1e-30), lora=True), sft(tmp_path, None, lora=True)
    compare(ours, stock, SFT_METRICS)


def test_metrics_of_supervised_fine_tuning_are_those_of_the_clean_pass(tmp_path):
    """With a rho that matters: the first step's metrics are still the stock Trainer's, and every token counts once."""
    ours, stock = sft(tmp_path, SAMConfig(rho=0.5)), sft(tmp_path, None)
    for key in ("loss", "num_tokens", "mean_token_accuracy", "entropy"):
        assert tiny.logged(ours, key)[0] == tiny.logged(stock, key)[0]
    assert tiny.logged(ours, "num_tokens") == tiny.logged(stock, "num_tokens")
    assert tiny.logged(ours, "loss") != tiny.logged(stock, "loss")
    assert tiny.logged(ours, "sam_perturbation_norm") == pytest.approx([0.5] * 3, rel=1e-5)


def dpo(tmp_path, sam: SAMConfig | None):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class SAMDPO(SAMTrainerMixin, DPOTrainer):
        pass

    words = [[f"<{i}>" for i in row["input_ids"].tolist()] for row in tiny.texts(16)]
    data = Dataset.from_list(
        [{"prompt": " ".join(w[:3]), "chosen": " ".join(w[3:6]), "rejected": " ".join(w[6:])} for w in words]
    )
    set_seed(0)
    kwargs = {
        "model": tiny.llama(),
        "ref_model": tiny.llama(),
        "args": DPOConfig(**common(tmp_path, max_length=16)),
        "train_dataset": data,
        "processing_class": Tokens(),
    }
    trainer = DPOTrainer(**kwargs) if sam is None else SAMDPO(sam_config=sam, **kwargs)
    trainer.train()
    return trainer


@pytest.mark.parametrize("scope", SCOPES)
def test_direct_preference_optimization(scope, tmp_path):
    keys = ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen", "num_tokens")
    compare(dpo(tmp_path, SAMConfig(rho=1e-30, scope=scope)), dpo(tmp_path, None), keys)


@pytest.mark.parametrize("splits", [{"scope": "micro", "m": 1}, {"ascent_fraction": 0.5}])
def test_batches_of_pairs_are_not_split(splits, tmp_path):
    """DPO stacks all chosen rows on all rejected rows: half of that is no batch of pairs."""
    with pytest.raises(ValueError, match=next(key for key in splits if key != "scope")):
        dpo(tmp_path, SAMConfig(**splits))


def test_trainers_that_generate_their_batches_are_refused(tmp_path):
    """GRPO counts its own steps in `training_step`, so a second pass would see other completions."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    class SAMGRPO(SAMTrainerMixin, GRPOTrainer):
        pass

    with pytest.raises(ValueError, match=r"SAM.*(GRPO|generate)"):
        SAMGRPO(
            model=tiny.llama(),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=GRPOConfig(**common(tmp_path, num_generations=2)),
            train_dataset=Dataset.from_list([{"prompt": "<3> <4>"}] * 8),
            processing_class=Tokens(),
            sam_config=SAMConfig(),
        )


# --- transformers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
def test_sequence_to_sequence(scope, tmp_path):
    class SAMSeq2Seq(SAMTrainerMixin, Seq2SeqTrainer):
        pass

    def run(sam):
        set_seed(0)
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=tiny.VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.1,
                     decoder_start_token_id=0)
        )  # fmt: skip
        args = Seq2SeqTrainingArguments(**common(tmp_path, predict_with_generate=True, generation_max_length=4))
        kwargs = {"model": model, "args": args, "train_dataset": tiny.texts(), "eval_dataset": tiny.texts(4)}
        trainer = Seq2SeqTrainer(**kwargs) if sam is None else SAMSeq2Seq(sam_config=sam, **kwargs)
        trainer.train()
        return trainer

    ours, stock = run(SAMConfig(rho=1e-30, scope=scope)), run(None)
    compare(ours, stock, ("loss", "grad_norm"))
    assert ours.evaluate()["eval_loss"] == stock.evaluate()["eval_loss"]


def test_a_trainer_of_the_users_own_that_counts_in_compute_loss(tmp_path):
    """Only the clean pass moves its counter, without its being named anywhere."""

    class Counting(tiny.Watched, tiny.Trainer):
        seen = 0

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.seen += len(inputs["labels"])
            return super().compute_loss(model, inputs, *args, **kwargs)

    class SAMCounting(SAMTrainerMixin, Counting):
        pass

    args = tiny.arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = SAMCounting(model=tiny.mlp(), args=args, train_dataset=tiny.vectors(), sam_config=SAMConfig())
    trainer.train()
    assert len(trainer.passes) == 12
    assert trainer.seen == 3 * 2 * 4
