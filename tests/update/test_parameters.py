import pytest
import torch
from models import tiny_classifier
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from hf_sam.update.parameters import TrainedParameters, gradients_only_for, put_gradients, take_gradients


def select(model, perturb, optimizer=None):
    """The names of what is perturbed."""
    parameters = TrainedParameters(model, perturb, optimizer)
    return [parameters.names[p] for p in parameters.selected]


def test_selectors():
    model = tiny_classifier()
    assert select(model, "all") == [name for name, _ in model.named_parameters()]
    assert select(model, "norm") == ["norm.weight", "norm.bias"]
    assert select(model, "no-norm-no-bias") == ["unused", "first.weight", "second.weight"]
    assert select(model, "second.*") == ["second.weight", "second.bias"]
    assert select(model, ["first.weight", "*.bias"]) == ["first.weight", "first.bias", "norm.bias", "second.bias"]


def test_frozen_parameters_are_never_selected():
    model = tiny_classifier()
    model.first.requires_grad_(False)
    assert not any("first" in name for name in select(model, "all"))
    assert select(model, "first.*") == [], "until they are thawed"
    with pytest.raises(ValueError, match=r"the pattern 'third\.\*' matches none"):
        select(model, "third.*")
    with pytest.raises(ValueError, match=r"the pattern 'third\.\*' matches none"):
        select(model, ["second.*", "third.*"])


def test_parameters_that_are_frozen_and_thawed_are_noticed():
    model = tiny_classifier()
    model.first.requires_grad_(False)
    parameters = TrainedParameters(model, "first.*")
    assert parameters.selected == []
    assert not parameters.refresh()
    model.first.requires_grad_(True)
    assert parameters.refresh()
    assert parameters.selected == [model.first.weight, model.first.bias]
    model.second.requires_grad_(False)
    assert parameters.refresh()
    assert not set(model.second.parameters()) & set(parameters.trainable)
    assert not parameters.refresh()


def test_what_the_optimizer_does_not_step_is_not_perturbed():
    model = tiny_classifier()
    optimizer = torch.optim.SGD(model.second.parameters(), lr=0.1)
    assert select(model, "all", optimizer) == ["second.weight", "second.bias"]
    assert set(model.first.parameters()) <= set(TrainedParameters(model, "all", optimizer).trainable)


def test_groups_that_the_optimizer_gets_later_are_perturbed_from_then_on():
    model = tiny_classifier()
    optimizer = torch.optim.SGD(model.second.parameters(), lr=0.1)
    parameters = TrainedParameters(model, "all", optimizer)
    optimizer.add_param_group({"params": list(model.first.parameters())})
    assert parameters.refresh()
    assert set(parameters.selected) == {*model.first.parameters(), *model.second.parameters()}


def test_an_optimizer_that_holds_other_tensors_says_nothing_about_the_models():
    model = tiny_classifier()
    flat = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    parameters = TrainedParameters(model, "all", flat)
    assert parameters.selected == list(model.parameters())


def test_a_loss_with_weights_of_its_own_is_perturbed_where_the_optimizer_steps_it():
    model, loss = tiny_classifier(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    parameters = TrainedParameters(model, "all", optimizer, {"loss": loss})
    assert [parameters.names[p] for p in parameters.selected][-2:] == ["loss.weight", "loss.bias"]
    assert parameters.in_model == list(model.parameters())


def tiny_llama(tied, kind=LlamaForCausalLM):
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return kind(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=tied))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
def test_a_tied_head_is_left_out_with_the_embeddings():
    tied, untied = tiny_llama(True), tiny_llama(False)
    body = [
        name for name, _ in untied.named_parameters() if name not in ("model.embed_tokens.weight", "lm_head.weight")
    ]
    assert select(untied, "no-embeddings") == [*body, "lm_head.weight"]
    assert select(untied, "no-embeddings-no-head") == body
    assert select(tied, "no-embeddings") == select(tied, "no-embeddings-no-head") == body
    lora = get_peft_model(tiny_llama(True), LoraConfig(target_modules=["q_proj"]))
    assert select(lora, "no-embeddings-no-head") == [name for name, p in lora.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("model", [tiny_llama(True, LlamaModel), nn.Linear(2, 2)])
def test_a_model_without_a_head_is_an_error_for_the_selector_without_a_head(model):
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no recognisable head.*Use 'no-embeddings'"):
        select(model, "no-embeddings-no-head")


def test_nothing_selected_is_an_error():
    with pytest.raises(ValueError, match="perturb='norm' selects none"):
        select(nn.Linear(2, 2), "norm")


def test_tied_parameters_are_perturbed_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    assert select(model, "all") == ["a.weight", "a.bias", "b.bias"]


def test_gradients_are_moved_and_not_copied():
    model = tiny_classifier()
    model.first.weight.grad = gradient = torch.ones_like(model.first.weight)
    taken = take_gradients(list(model.parameters()))
    assert model.first.weight.grad is None
    put_gradients(taken)
    assert model.first.weight.grad is gradient


def test_gradients_that_lie_in_a_buffer_are_copied_out_of_it():
    p, buffer = nn.Parameter(torch.zeros(3)), torch.ones(5)
    p.grad = buffer[1:4]
    taken = take_gradients([p])[p]
    buffer.zero_()
    assert torch.equal(taken, torch.ones(3))
    p.grad = whole = torch.ones(3)
    assert take_gradients([p], are_views=True)[p].data_ptr() != whole.data_ptr()


def test_gradients_only_for_restores_requires_grad_after_an_error():
    model = tiny_classifier()
    with pytest.raises(RuntimeError), gradients_only_for([model.first.weight], list(model.parameters())):
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["first.weight"]
        raise RuntimeError
    assert all(p.requires_grad for p in model.parameters())
