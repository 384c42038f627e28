import copy

import pytest
import torch
from models import OrderedSAMTrainer, OrderedTrainer, arguments, examples, tiny_classifier, weights
from peft import LoraConfig, get_peft_model

from hf_sam import SAMConfig
from hf_sam.methods.auxiliary_lora import AuxiliaryLora


def lora(**kwargs):
    model = tiny_classifier(torch.float64, **kwargs)
    torch.manual_seed(2)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["first", "second"], lora_dropout=0.0)
    return get_peft_model(model, config).double()


def run(folder, sam_config, model=None, **kwargs):
    cls = OrderedTrainer if sam_config is None else OrderedSAMTrainer
    extra = {} if sam_config is None else {"sam_config": sam_config}
    trainer = cls(model=model or lora(), args=arguments(folder, **kwargs), train_dataset=examples(8), **extra)
    trainer.train(resume_from_checkpoint=kwargs.pop("resume", None))
    return trainer


def explicit_run(steps, rho, lr=0.1, s=3.0):
    """The method on an explicit two-layer function: W + s B1 A1 + s B2 A2, first pair down, second up and clipped."""
    reference = lora()
    auxiliary = AuxiliaryLora(reference, seed=42).state_dict()
    weight = dict(reference.named_parameters())
    rows = [{k: torch.stack([r[k] for r in examples(8)[i : i + 4]]) for k in ("x", "labels")} for i in (0, 4)]
    names = [f"base_model.model.{layer}" for layer in ("first", "second")]
    down = [weight[f"{n}.lora_{letter}.default.weight"].detach().clone() for n in names for letter in "AB"]
    up = [auxiliary[f"{letter}2.{n}"].clone() for n in names for letter in "AB"]
    for step in range(steps):
        down, up = ([t.detach().requires_grad_(True) for t in part] for part in (down, up))
        batch = rows[step % 2]
        h = batch["x"]
        for i, name in enumerate(names):
            w = weight[f"{name}.base_layer.weight"] + s * down[2 * i + 1] @ down[2 * i] + s * up[2 * i + 1] @ up[2 * i]
            h = h @ w.T + weight[f"{name}.base_layer.bias"]
            if i == 0:
                norm = [weight[f"base_model.model.norm.{part}"] for part in ("weight", "bias")]
                h = torch.tanh(torch.nn.functional.layer_norm(h, h.shape[-1:], *norm))
        gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(h, batch["labels"]), [*down, *up])
        down = [t - lr * g for t, g in zip(down, gradients[:4], strict=True)]
        up = [t + lr * g for t, g in zip(up, gradients[4:], strict=True)]
        size = torch.cat([(s * up[1] @ up[0]).flatten(), (s * up[3] @ up[2]).flatten()]).norm()
        if size > rho:
            up[1], up[3] = up[1] * rho / size, up[3] * rho / size
    return down


@pytest.mark.parametrize("rho", [0.02, 10.0])
def test_first_pair_descends_at_the_weights_perturbed_by_the_second(tmp_path, rho):
    trainer = run(tmp_path, SAMConfig(method="bilora", rho=rho), max_steps=4)
    found = [p for name, p in trainer.model.named_parameters() if "lora_" in name]
    for actual, expected in zip(found, explicit_run(4, rho), strict=True):
        torch.testing.assert_close(actual.detach(), expected.detach(), rtol=0, atol=1e-12)
    norms = [entry["sam_perturbation_norm"] for entry in trainer.state.log_history[:4]]
    assert max(norms) == pytest.approx(0.02, rel=1e-5) if rho == 0.02 else max(norms) < 10


def test_norm_is_that_of_the_product():
    auxiliary = AuxiliaryLora(lora(), seed=0)
    state = auxiliary.state_dict()
    for factor in state.values():
        factor.normal_(generator=torch.Generator().manual_seed(3))
    layers = {name.partition(".")[2] for name in state}
    product = torch.cat([(3.0 * state[f"B2.{layer}"] @ state[f"A2.{layer}"]).flatten() for layer in layers])
    torch.testing.assert_close(auxiliary.norm().double(), product.norm(), rtol=1e-6, atol=0)


def test_leaves_nothing_behind(tmp_path):
    trainer = run(tmp_path, SAMConfig(method="bilora", rho=0.5), max_steps=3)
    stock = run(tmp_path, None, max_steps=1)
    trainer.save_model(str(tmp_path / "bilora"))
    stock.save_model(str(tmp_path / "stock"))
    from safetensors import safe_open

    names = [set(safe_open(tmp_path / kind / "adapter_model.safetensors", "pt").keys()) for kind in ("bilora", "stock")]
    assert names[0] == names[1]
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_evaluation_does_not_see_the_second_pair():
    model = lora()
    auxiliary = AuxiliaryLora(model, seed=0)
    batch = {k: torch.stack([row[k] for row in examples(4)]) for k in ("x", "labels")}
    clean = model(**batch)["logits"]
    auxiliary.state_dict()["B2.base_model.model.first"].fill_(1.0)
    assert torch.equal(model(**batch)["logits"], clean)
    with auxiliary.active():
        assert not torch.equal(model(**batch)["logits"], clean)


def test_resumed_is_bitwise_uninterrupted(tmp_path):
    config = SAMConfig(method="bilora", rho=0.5)
    whole = run(tmp_path / "whole", config, max_steps=5, save_strategy="steps", save_steps=2)
    resumed = OrderedSAMTrainer(
        model=lora(),
        args=arguments(tmp_path / "resumed", max_steps=5),
        train_dataset=examples(8),
        sam_config=copy.copy(config),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_a_model_without_lora_is_told_so(tmp_path):
    with pytest.raises(ValueError, match=r"method='bilora'.*no linear LoRA layer.*get_peft_model"):
        run(tmp_path, SAMConfig(method="bilora"), tiny_classifier())
