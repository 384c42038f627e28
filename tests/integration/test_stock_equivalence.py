"""Two real passes with a vanishing perturbation are bitwise the stock Trainer, whatever the Trainer is asked to do."""

from __future__ import annotations

import itertools

import pytest
import torch
from integration import tiny
from torch import nn

from hf_sam import SAMConfig

# PEFT still reads the name that transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SCOPES = ("micro", "device", "global")


def both(make_model, data, tmp_path, scope: str, make_extra=dict, **args):
    """The same run with a vanishing rho and by the stock Trainer."""
    sam = SAMConfig(rho=1e-30, scope=scope)
    return tuple(
        tiny.trained(make_model(), data, tmp_path, config, extra=make_extra(), **args) for config in (sam, None)
    )


# Of lora, checkpointing, bf16 and accumulation: the fewest settings in which every two show all pairs of values.
PAIRWISE = [(0, 0, 0, 0), (0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)]
THE_OTHERS = [setting for setting in itertools.product((0, 1), repeat=4) if setting not in PAIRWISE]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("lora", "checkpointing", "bf16", "accumulates"),
    [*PAIRWISE, *(pytest.param(*setting, marks=pytest.mark.slow) for setting in THE_OTHERS)],
)
def test_every_setting(lora, checkpointing, bf16, accumulates, scope, tmp_path):
    def model():
        vit = tiny.vit(dropout=0.1)
        return tiny.with_lora(vit, ["q_proj", "v_proj"], dropout=0.1) if lora else vit

    ours, stock = both(
        model,
        tiny.images(),
        tmp_path,
        scope,
        gradient_accumulation_steps=1 + accumulates,
        bf16=bool(bf16),
        activation_checkpointing=bool(checkpointing),
    )
    tiny.assert_same_run(ours, stock)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("model", "data"),
    [(tiny.bert, tiny.sentences), (tiny.gpt2, tiny.texts), (tiny.llama, tiny.texts)],
    ids=["bert", "gpt2 (tied)", "llama"],
)
def test_models_of_language(model, data, scope, tmp_path):
    make = model if model is tiny.llama else lambda: model(dropout=0.2)
    tiny.assert_same_run(*both(make, data(), tmp_path, scope, gradient_accumulation_steps=2))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("data", "max_steps"),
    [
        (tiny.vectors(10), 6),  # windows of 2, 2 and 1 micro-batches, twice
        (tiny.vectors(9), 5),  # the last micro-batch is short, too
        (tiny.Stream(tiny.vectors(16)), 4),
        (tiny.Stream(tiny.vectors(10)), 6),  # ends in the middle of a window; the Trainer starts over
    ],
    ids=["short last window", "short last batch", "stream", "stream ends within a window"],
)
def test_windows(data, max_steps, scope, tmp_path):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": max_steps}
    ours, stock = both(lambda: tiny.mlp(dropout=0.2), data, tmp_path, scope, **options)
    assert len(stock.trajectory) == max_steps
    tiny.assert_same_run(ours, stock)


def smooth_labels(outputs, labels, num_items_in_batch=None):
    """A loss of the user's own, normalised over the window as the Trainer asks for."""
    loss = nn.functional.cross_entropy(outputs["logits"], labels, label_smoothing=0.3, reduction="sum")
    return loss / num_items_in_batch


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ({}, {"compute_loss_func": smooth_labels}),
        ({"torch_empty_cache_steps": 2}, {}),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, {}),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, {}),
        ({"max_grad_norm": 0.0}, {}),
        ({"dataloader_drop_last": True, "warmup_steps": 2, "lr_scheduler_type": "cosine"}, {}),
        ({"train_sampling_strategy": "random", "dataloader_num_workers": 0, "max_steps": 9}, {}),
    ],
    ids=lambda value: ", ".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_options_of_the_trainer(options, extra, scope, tmp_path):
    ours, stock = both(
        lambda: tiny.mlp(dropout=0.2),
        tiny.vectors(18),
        tmp_path,
        scope,
        lambda: extra,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        **options,
    )
    tiny.assert_same_run(ours, stock)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("options", [{"neftune_noise_alpha": 5.0}, {"label_smoothing_factor": 0.2}], ids=str)
@pytest.mark.parametrize(
    ("model", "data"), [(tiny.bert, tiny.sentences), (tiny.gpt2, tiny.texts)], ids=["classifier", "causal lm"]
)
def test_options_for_language_models(model, data, options, scope, tmp_path):
    ours, stock = both(
        lambda: model(dropout=0.1), data(), tmp_path, scope, gradient_accumulation_steps=2, max_steps=2, **options
    )
    tiny.assert_same_run(ours, stock)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop", "adagrad"])
def test_base_optimizers(optim, scope, tmp_path):
    options = {"optim": optim, "weight_decay": 0.1, "gradient_accumulation_steps": 2}
    tiny.assert_same_run(*both(tiny.mlp, tiny.vectors(), tmp_path, scope, **options))


def test_an_optimizer_of_the_users_own(tmp_path):
    def trained(sam):
        model = tiny.mlp()
        optimizer = torch.optim.NAdam(
            [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(model.parameters())], weight_decay=0.1
        )
        return tiny.trained(model, tiny.vectors(), tmp_path, sam, extra={"optimizers": (optimizer, None)})

    tiny.assert_same_run(trained(SAMConfig(rho=1e-30)), trained(None))


def test_a_schedule_that_counts_its_calls(tmp_path):
    def trained(sam):
        model, calls = tiny.mlp(), itertools.count()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + next(calls)))
        return tiny.trained(model, tiny.vectors(), tmp_path, sam, extra={"optimizers": (optimizer, scheduler)})

    tiny.assert_same_run(trained(SAMConfig(rho=1e-30)), trained(None))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rho_zero_is_one_pass_and_the_stock_trainer(accumulation, tmp_path):
    options = {"gradient_accumulation_steps": accumulation}
    ours = tiny.trained(tiny.vit(dropout=0.1), tiny.images(), tmp_path, SAMConfig(rho=0), **options)
    stock = tiny.trained(tiny.vit(dropout=0.1), tiny.images(), tmp_path, None, **options)
    tiny.assert_same_run(ours, stock, passes=1)
    assert not [key for entry in ours.state.log_history for key in entry if key.startswith("sam_")]


# --- the same examples, divided otherwise --------------------------------------------------------------------------


def trajectory(model, data, tmp_path, sam, batch, accumulation) -> torch.Tensor:
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
    return torch.stack(tiny.trained(model, data, tmp_path, sam, max_steps=3, max_grad_norm=0.1, **options).trajectory)


@pytest.mark.parametrize(("method", "scope"), [("sam", "device"), ("sam", "global"), ("asam", "device")])
@pytest.mark.parametrize("kind", ["mean over examples", "sum over tokens"])
def test_a_window_is_one_batch(kind, method, scope, tmp_path):
    def run(batch, accumulation):
        sam = SAMConfig(method=method, rho=0.1, scope=scope)
        if kind == "mean over examples":
            model, data = tiny.mlp(torch.float64), tiny.vectors(dtype=torch.float64)
        else:
            model, data = tiny.llama(torch.float64), tiny.texts()
        return trajectory(model, data, tmp_path, sam, batch, accumulation)

    whole = run(8, 1)
    for batch, accumulation in ((1, 8), (4, 2)):
        torch.testing.assert_close(run(batch, accumulation), whole, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("kind", ["mean over examples", "sum over tokens"])
def test_m_splits_a_batch_as_accumulation_would(kind, tmp_path):
    def run(batch, accumulation, m):
        sam = SAMConfig(rho=0.1, scope="micro", m=m)
        if kind == "mean over examples":
            model, data = tiny.mlp(torch.float64), tiny.vectors(dtype=torch.float64)
        else:
            model, data = tiny.llama(torch.float64), tiny.texts()
        return trajectory(model, data, tmp_path, sam, batch, accumulation)

    for m in (1, 4):
        expected = run(m, 8 // m, None)
        for batch, accumulation in ((8, 1), (4, 2)) if m == 1 else ((8, 1),):
            torch.testing.assert_close(run(batch, accumulation, m), expected, rtol=1e-10, atol=1e-11)
    assert not torch.allclose(run(8, 1, 1), run(8, 1, 4))


def test_scopes_differ_where_they_should(tmp_path):
    runs = [
        trajectory(
            tiny.mlp(torch.float64), tiny.vectors(dtype=torch.float64), tmp_path, SAMConfig(rho=0.1, scope=s), 4, 2
        )
        for s in SCOPES
    ]
    assert not torch.allclose(runs[0], runs[1])
    assert torch.equal(runs[1], runs[2])  # one process is one device


@pytest.mark.parametrize(("scope", "accumulation"), list(itertools.product(SCOPES, (1, 2))))
def test_weights_are_never_perturbed_where_callbacks_see_them(scope, accumulation, tmp_path):
    seen = []

    class Observer(tiny.TrainerCallback):
        def note(self, args, state, control, **kwargs):
            seen.append((state.global_step, tiny.flat(trainer.model)))

        on_step_begin = on_substep_end = on_pre_optimizer_step = note

    sam = SAMConfig(rho=0.5, scope=scope)
    trainer = tiny.trainer_for(tiny.mlp(), tiny.vectors(), tmp_path, sam, gradient_accumulation_steps=accumulation)
    before = [tiny.flat(trainer.model)]
    trainer.add_callback(Observer())
    trainer.train()
    assert len(seen) == 3 * (accumulation + 1)
    expected = before + trainer.trajectory
    for step, weights in seen:
        assert torch.equal(weights, expected[step])
    assert sum(not torch.equal(w, expected[step]) for step, w in trainer.passes) == 3 * accumulation
