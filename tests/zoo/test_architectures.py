"""Architectures of transformers under two passes with a vanishing perturbation: bitwise the stock trainer's run."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DecisionTransformerConfig,
    DecisionTransformerModel,
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
    Trainer,
    set_seed,
)
from zoo import architectures, kit
from zoo.architectures import parts

from hf_sam import SAMConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # the models' own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
# By name and micro-batches in a window: what each kind of model does between its passes, once. The others are slow.
QUICK = {
    ("BERT, masked words", 2),
    ("ALBERT, shared layers", 1),
    ("BigBird, random blocks", 1),
    ("I-BERT, quantised", 1),
    ("Llama, frequencies that follow the length", 2),
    ("Mixtral, router's loss", 2),
    ("Mamba", 1),
    ("OPT", 2),
    ("T5, generating", 1),
    ("BART, layers left out", 1),
    ("ViT, masked autoencoder", 2),
    ("Swin", 1),
    ("MobileNetV2, BatchNorm", 2),
    ("YOLOS", 1),
    ("SegFormer", 1),
    ("wav2vec 2.0, CTC", 1),
    ("wav2vec 2.0 conformer, BatchNorm", 2),
    ("Whisper", 1),
    ("CLIP, contrastive", 1),
    ("CLIP, contrastive", 2),
    ("Informer, random keys", 1),
    ("PatchTST, random masks", 1),
}


def builder(row, tmp_path, **overrides):
    def build(cls, **sam):
        options = {**row.arguments, **overrides}
        evaluates = options.get("eval_strategy") != "no"
        return cls(
            model=row.build(),
            args=kit.arguments(tmp_path, kit.arguments_of(row.stock), **options),
            train_dataset=row.data(),
            eval_dataset=row.data()[:4] if evaluates else None,
            data_collator=row.collate,
            compute_metrics=kit.checksums if row.checks_predictions else None,
            **sam,
        )

    return build, row.stock


@pytest.mark.parametrize(
    ("name", "micro_batches"),
    [
        pytest.param(name, count, marks=[] if (name, count) in QUICK else pytest.mark.slow)
        for name in architectures.ZOO
        for count in (1, 2)
    ],
)
def test_an_architecture(name, micro_batches, tmp_path):
    build, stock = builder(architectures.ZOO[name], tmp_path, gradient_accumulation_steps=micro_batches)
    kit.assert_same_as_stock(build, stock)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(architectures.ZOO))
def test_an_architecture_under_gradient_checkpointing(name, tmp_path):
    """Its forward passes run again in the backward pass, and so does all that they change."""
    row = architectures.ZOO[name]
    if not row.model_class.supports_gradient_checkpointing:
        pytest.skip("this architecture has none")
    build, stock = builder(row, tmp_path, gradient_accumulation_steps=2, activation_checkpointing=True)
    kit.assert_same_as_stock(build, stock)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(architectures.ZOO))
def test_an_architecture_whose_micro_batches_are_perturbed_each(name, tmp_path):
    build, stock = builder(architectures.ZOO[name], tmp_path, gradient_accumulation_steps=2)
    kit.assert_same_as_stock(build, stock, sam=SAMConfig(rho=1e-30, scope="micro"))


@pytest.mark.parametrize("micro_batches", [pytest.param(count, marks=pytest.mark.slow) for count in (1, 2)])
def test_reformer_with_seeds_that_repeat(micro_batches, tmp_path, monkeypatch):
    """Its reversible layers ask the operating system for a seed in every pass, so that no two runs are the same. Here the
    seed follows from the random state."""

    def seed():
        drawn = int(torch.randint(2**31, ()))
        torch.manual_seed(drawn)
        return drawn

    monkeypatch.setattr(torch, "seed", seed)
    build, stock = builder(architectures.REFORMER, tmp_path, gradient_accumulation_steps=micro_batches)
    kit.assert_same_as_stock(build, stock)


class Retrievers(torch.nn.Module):
    """Two encoders side by side that compute no loss."""

    def __init__(self):
        super().__init__()
        config = DPRConfig(**parts.TEXT, projection_dim=8)
        self.questions, self.passages = DPRQuestionEncoder(config), DPRContextEncoder(config)

    def forward(self, questions, passages):
        return self.questions(questions).pooler_output, self.passages(passages).pooler_output


class RetrievalTrainer(Trainer):
    """Every other passage of a batch is a wrong one."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        questions, passages = model(**inputs)
        scores = questions @ passages.T
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))
        return (loss, {"loss": loss, "scores": scores}) if return_outputs else loss


class ActionTrainer(Trainer):
    """A regression on one of several outputs; its label is taken out of the batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        aim = inputs.pop("aim")
        outputs = model(**inputs)
        loss = (outputs.action_preds - aim).square().mean()
        return (loss, {"loss": loss, "actions": outputs.action_preds}) if return_outputs else loss


def decision_transformer():
    return DecisionTransformerModel(
        DecisionTransformerConfig(state_dim=4, act_dim=2, hidden_size=16, max_ep_len=16, n_layer=2, n_head=2)
    )


EPISODES = parts.of(
    states=parts.reals(5, 4),
    actions=parts.reals(5, 2),
    rewards=parts.reals(5, 1),
    returns_to_go=parts.reals(5, 1),
    timesteps=parts.constant(torch.arange(5)),
    attention_mask=parts.constant(torch.ones(5, dtype=torch.long)),
    aim=parts.reals(5, 2),
)


@pytest.mark.parametrize("micro_batches", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("stock", "make", "data"),
    [
        (RetrievalTrainer, Retrievers, parts.of(questions=parts.ids(8), passages=parts.ids(8))),
        (ActionTrainer, decision_transformer, EPISODES),
    ],
    ids=["DPR", "decision transformer"],
)
def test_a_loss_of_the_trainers_own(stock, make, data, micro_batches, tmp_path):
    def build(cls, **sam):
        set_seed(0)
        args = kit.arguments(tmp_path, gradient_accumulation_steps=micro_batches, remove_unused_columns=False)
        return cls(model=make(), args=args, train_dataset=data(), eval_dataset=data()[:4], **sam)

    kit.assert_same_as_stock(build, stock)
