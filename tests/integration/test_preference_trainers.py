"""TRL's trainers whose batches begin with strings, and whose metrics are collected in `compute_loss`."""

from __future__ import annotations

import pytest
import torch
from integration import equivalence, tiny
from integration.test_other_trainers import common
from transformers import set_seed

from hf_sam import SAMConfig, SAMTrainerMixin

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def preferences(n: int = 16):
    from datasets import Dataset

    words = [[f"<{i}>" for i in row["input_ids"].tolist()] for row in tiny.texts(n)]
    return Dataset.from_list(
        [{"prompt": " ".join(w[:3]), "chosen": " ".join(w[3:6]), "rejected": " ".join(w[6:])} for w in words]
    )


def orpo():
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return ORPOTrainer, ORPOConfig


def cpo():
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return CPOTrainer, CPOConfig


def run(kind, folder, sam: SAMConfig | None, **overrides):
    base, config = kind()
    cls = base if sam is None else type(f"SAM{base.__name__}", (SAMTrainerMixin, base), {})
    set_seed(0)
    trainer = cls(
        model=tiny.llama(),
        args=config(**common(folder, max_length=16, **overrides)),
        train_dataset=preferences(),
        processing_class=equivalence.words_as_tokens(),
        **({} if sam is None else {"sam_config": sam}),
    )
    trainer.train()
    trainer.random_after = (torch.get_rng_state(),)
    return trainer


@pytest.mark.parametrize("kind", [orpo, cpo], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("scope", ["micro", "device", "global"])
def test_preference_optimization_without_a_reference(kind, scope, tmp_path):
    ours, stock = run(kind, tmp_path, SAMConfig(rho=1e-30, scope=scope)), run(kind, tmp_path, None)
    equivalence.assert_like_stock(ours, stock)
    assert len(tiny.logged(stock, "rewards/margins")) == 3


@pytest.mark.parametrize("kind", [orpo, cpo], ids=lambda kind: kind.__name__)
def test_metrics_are_those_of_the_clean_pass(kind, tmp_path):
    """With a rate of zero and a rho that matters, every metric is the stock Trainer's."""
    ours, stock = (run(kind, tmp_path, sam, learning_rate=0.0) for sam in (SAMConfig(rho=0.5), None))
    for mine, theirs in zip(equivalence.entries(ours), equivalence.entries(stock), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(mine[key] == theirs[key] for key in theirs.keys() - {"grad_norm"})
    assert min(map(abs, tiny.logged(ours, "sam_sharpness"))) > 1e-4


@pytest.mark.parametrize("kind", [orpo, cpo], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("method", [{"method": "random"}, {"method": "previous"}], ids=lambda method: method["method"])
def test_one_pass_methods(kind, method, tmp_path):
    ours, stock = run(kind, tmp_path, SAMConfig(rho=1e-30, **method)), run(kind, tmp_path, None)
    equivalence.assert_like_stock(ours, stock, perturbs=False)


@pytest.mark.parametrize("kind", [orpo, cpo], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    ("field", "sam"),
    [
        ("m", {"scope": "micro", "m": 1}),
        ("ascent_fraction", {"ascent_fraction": 0.5}),
        ("ascent_fraction|subset", {"method": "subset"}),
        ("esam", {"method": "esam"}),
    ],
    ids=str,
)
def test_pairs_are_not_taken_in_parts(kind, field, sam, tmp_path):
    with pytest.raises(ValueError, match=rf"\b({field})\b") as error:
        run(kind, tmp_path, SAMConfig(rho=0.05, **sam))
    assert "\n" not in str(error.value)
