"""The loss on a subset: the right mean, whatever the batch size, and a model left exactly as it was found."""

import copy
import random

import numpy as np
import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import BertForSequenceClassification

from hf_sam.sharpness import GaussNewton, Hessian, Subset, SubsetLoss, m_sharpness, sam_sharpness

from . import toys

MODELS = {
    "batch-norm": toys.normed_net,
    "bert": toys.bert,
    "masked-lm": toys.tied_masked_lm,
    "gpt2": toys.tied_gpt2,
    "llama": toys.llama,
}


@pytest.fixture(params=MODELS)
def model_and_examples(request):
    return MODELS[request.param]()


def numbers(model, examples, batch_size: int) -> torch.Tensor:
    """One of each kind of number that is computed batch by batch."""
    loss = SubsetLoss(model, Subset(examples, toys.collate, batch_size))
    value, gradient = loss.gradient()
    product = Hessian(loss) @ gradient
    curved = GaussNewton(loss) @ gradient
    chunked = m_sharpness(loss, m=4, rho=0.05)
    return torch.tensor([loss(), value, gradient.norm(), product.norm(), curved.norm(), chunked], dtype=torch.float64)


def test_the_loss_is_the_mean_over_all_labels_at_once(model_and_examples):
    model, examples = model_and_examples
    batch = toys.collate(examples)
    model.eval()
    expected = model(**batch).loss
    expected.backward()
    loss, gradient = SubsetLoss(model, Subset(examples, toys.collate, batch_size=2)).gradient()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient, flat, atol=1e-6, rtol=1e-4)


def test_the_batch_size_changes_nothing_beyond_rounding(model_and_examples):
    model, examples = model_and_examples
    reference = numbers(model, examples, batch_size=len(examples))
    for batch_size in (1, 2, 3):
        torch.testing.assert_close(numbers(model, examples, batch_size), reference, rtol=2e-5, atol=1e-6)


def test_labels_that_do_not_count_leave_no_trace_even_where_a_batch_has_none_that_do():
    model, examples = toys.tied_masked_lm()
    silent = [{**example, "labels": np.full_like(example["labels"], -100)} for example in examples[:3]]
    loss = SubsetLoss(model, Subset(examples, toys.collate, batch_size=1))
    padded = SubsetLoss(model, Subset([*silent, *examples], toys.collate, batch_size=1))
    assert padded.num_labels == loss.num_labels
    assert padded() == pytest.approx(loss(), rel=1e-6)


def test_real_valued_targets_count_by_element():
    model, examples = toys.bert(problem_type="multi_label_classification")
    examples = [{**e, "labels": np.eye(3, dtype=np.float32)[e["labels"]]} for e in examples]
    one, many = (SubsetLoss(model, Subset(examples, toys.collate, size)) for size in (7, 3))
    assert many.num_labels == 21
    assert many() == pytest.approx(one(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_of_loading_changes_nothing(tmp_path, dtype):
    model, examples = toys.bert()
    model.bfloat16().save_pretrained(tmp_path)  # the weights themselves have 16 bits
    subset = Subset(examples, toys.collate)
    coarse, exact = (
        SubsetLoss(BertForSequenceClassification.from_pretrained(tmp_path, dtype=loaded), subset, dtype=dtype)
        for loaded in (torch.bfloat16, torch.float32)
    )
    assert coarse.weights.dtype == dtype
    assert sam_sharpness(coarse, [0.05, 0.5]) == sam_sharpness(exact, [0.05, 0.5])


def test_float64_agrees_with_float32_to_rounding():
    model, examples = toys.bert()
    subset = Subset(examples, toys.collate)
    single, double = (SubsetLoss(model, subset, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert single() == pytest.approx(double(), rel=1e-6)
    assert sam_sharpness(single, [0.5])[0.5] == pytest.approx(sam_sharpness(double, [0.5])[0.5], rel=1e-4)


# --- left as found ---------------------------------------------------------------------------------------------------


def state_of(model) -> dict:
    """Everything that a measurement could leave a trace in."""
    return {
        "modes": [module.training for module in model.modules()],
        "weights": copy.deepcopy(model.state_dict()),
        "dtypes": [p.dtype for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "torch": torch.random.get_rng_state(),
        "numpy": np.random.get_state()[1],
        "python": random.getstate(),
        "flags": (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.is_grad_enabled()),
        "forward": vars(model).get("forward"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_left_exactly_as_it_was_found(model_and_examples, dtype):
    model, examples = model_and_examples
    model.to(dtype).train()
    next(model.children()).eval()  # a part that is kept in evaluation mode stays there
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 0.5) if i % 2 else None
    before = state_of(model)
    numbers(model, examples, batch_size=3)
    toys.assert_same(before, state_of(model))


def test_the_model_is_left_as_it_was_found_when_a_pass_fails(monkeypatch):
    model, examples = toys.bert()
    model.train()
    loss = SubsetLoss(model, Subset(examples, toys.collate, batch_size=3))
    before = state_of(model)
    calls = []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    original = model.classifier.forward
    monkeypatch.setattr(model.classifier, "forward", fail)
    with pytest.raises(KeyboardInterrupt):
        loss.gradient()
    toys.assert_same(before, state_of(model))


@pytest.fixture
def fresh_accelerate():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_a_model_prepared_for_mixed_precision_is_measured_in_float32(fresh_accelerate):
    model, examples = toys.bert()
    expected = SubsetLoss(model, Subset(examples, toys.collate))()
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(copy.deepcopy(model))
    before = state_of(prepared)
    assert SubsetLoss(prepared, Subset(examples, toys.collate))() == expected
    toys.assert_same(before, state_of(prepared))


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own
def test_an_adapter_is_measured_as_its_factors_or_merged_as_full_weights():
    model, examples = toys.bert()
    full_size = model.num_parameters()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    )
    subset = Subset(examples, toys.collate)
    factors = SubsetLoss(adapted, subset)
    assert all("lora_" in name for name in factors.shapes)
    merged_model = copy.deepcopy(adapted).merge_and_unload().requires_grad_(True)
    merged = SubsetLoss(merged_model, subset)
    assert merged.weights.numel() == full_size
    assert merged() == pytest.approx(factors(), rel=1e-6)
    # The curvature is that of different spaces: for the factors, of the adapter's own gradient.
    adapted.eval()
    adapted(**toys.collate(examples)).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in adapted.parameters() if p.requires_grad])
    torch.testing.assert_close(factors.gradient()[1], expected, atol=1e-6, rtol=1e-4)


def test_a_selection_of_parameters_is_a_block_of_the_whole():
    model, examples = toys.bert()
    subset = Subset(examples, toys.collate)
    whole, block = SubsetLoss(model, subset), SubsetLoss(model, subset, perturb=["*classifier*"])
    assert set(block.shapes) == {"classifier.weight", "classifier.bias"}
    torch.testing.assert_close(block.gradient()[1], whole.gradient()[1][-block.weights.numel() :])


# --- the subset ------------------------------------------------------------------------------------------------------


def test_the_fingerprint_names_the_examples_and_nothing_else():
    _, examples = toys.bert()
    name = Subset(examples, toys.collate, batch_size=4).fingerprint
    assert name == Subset(copy.deepcopy(examples), toys.collate, batch_size=1).fingerprint
    assert name != Subset(examples[:-1], toys.collate).fingerprint
    assert name != Subset([examples[1], examples[0], *examples[2:]], toys.collate).fingerprint
    relabelled = [{**examples[0], "labels": 2}, *examples[1:]]
    assert name != Subset(relabelled, toys.collate).fingerprint


def test_a_subset_of_a_data_set_is_fixed_by_its_seed_and_has_the_model_s_columns():
    model, examples = toys.bert()
    rows = [{**example, "text": "left out", "label": example["labels"]} for example in examples]
    first, again, other = (Subset.of(rows, model, 5, seed, toys.collate) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len(first) == 5
    assert set(first.examples[0]) == {"input_ids", "attention_mask", "labels", "label"}
    assert len(Subset.of(rows, model, None, 0, toys.collate)) == len(rows)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_examples_without_labels_are_refused():
    model, examples = toys.bert()
    unlabelled = [{k: v for k, v in e.items() if k != "labels"} for e in examples]
    with pytest.raises(ValueError, match="returned no loss"):
        SubsetLoss(model, Subset(unlabelled, toys.collate))


def test_a_loss_that_depends_on_which_examples_come_together_is_refused():
    class Contrastive(toys.NormedNet):
        def forward(self, x, labels):
            output = super().forward(x, labels)
            output.loss = output.loss + output.logits.std(0).mean() if len(x) > 1 else output.loss
            return output

    _, examples = toys.normed_net()
    with pytest.raises(ValueError, match="not the mean over its labels"):
        SubsetLoss(Contrastive(), Subset(examples, toys.collate))


def test_a_collator_that_draws_random_numbers_is_refused():
    def noisy(examples):
        batch = toys.collate(examples)
        return {**batch, "x": batch["x"] + torch.randn(batch["x"].shape)}

    _, examples = toys.normed_net()
    with pytest.raises(ValueError, match="draws random numbers"):
        Subset(examples, noisy)


def test_quantised_and_sharded_models_are_refused():
    model, examples = toys.normed_net()
    subset = Subset(examples, toys.collate)
    sharded = copy.deepcopy(model)
    sharded.layers[0].weight.ds_id = 0  # what DeepSpeed marks the parameters with that it took away
    with pytest.raises(ValueError, match="sharded"):
        SubsetLoss(sharded, subset)
    model.layers[0].weight = torch.nn.Parameter(model.layers[0].weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        SubsetLoss(model, subset)


def test_a_coarse_dtype_is_refused():
    model, examples = toys.normed_net()
    with pytest.raises(ValueError, match="too coarse"):
        SubsetLoss(model, Subset(examples, toys.collate), dtype=torch.bfloat16)


def test_a_model_that_takes_none_of_the_columns_is_refused():
    model, _ = toys.bert()
    with pytest.raises(ValueError, match="none of the data set's columns"):
        Subset.of([{"text": "raw"}], model)
