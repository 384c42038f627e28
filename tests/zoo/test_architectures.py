"""Architectures of transformers under two passes with a vanishing perturbation: bitwise the stock trainer's run."""

from __future__ import annotations

import pytest
import torch
from zoo import architectures, kit

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
