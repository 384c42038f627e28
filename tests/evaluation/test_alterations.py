"""Quantization, pruning, noise and merging against other computations of the same, and what they leave alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, ViTConfig
from transformers import ViTForImageClassification as ViT
from transformers.pytorch_utils import Conv1D

from hf_sam.evaluation.libraries import LIBRARIES, loaded_by_library
from hf_sam.evaluation.merging import check_same_shapes, interpolate, mergeable_state, task_arithmetic
from hf_sam.evaluation.noise import add_noise, noisy
from hf_sam.evaluation.pruning import prune_smallest, pruned
from hf_sam.evaluation.quantization import dynamic_int8, quantized, round_to_nearest
from hf_sam.evaluation.weights import WeightMatrix, replaced, weight_matrices

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def bert(seed=0, **config):
    torch.manual_seed(seed)
    config = {**SIZE, "vocab_size": 20, "num_labels": 3, "max_position_embeddings": 16, **config}
    return BertForSequenceClassification(BertConfig(**config)).eval()


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- rounding ------------------------------------------------------------------------------------------------------


def nearest_level(weight, bits, group_size):
    """In NumPy, value by value: the levels of each group are listed, and the nearest one is looked up."""
    rounded = np.empty_like(weight)
    width = weight.shape[1]
    for row in range(len(weight)):
        for begin in range(0, width, group_size or width):
            part = slice(begin, begin + (group_size or width))
            group = weight[row, part]
            low, high = min(group.min(), 0.0), max(group.max(), 0.0)
            step = (high - low) / (2**bits - 1)
            first = -np.round(-low / step) * step
            levels = first + step * np.arange(2**bits)
            rounded[row, part] = levels[np.abs(group[:, None] - levels).argmin(1)]
    return rounded


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("group_size", [None, 5, 8, 100])
def test_rounding_takes_the_nearest_of_the_levels_of_each_group(bits, group_size):
    weight = gaussian(6, 24) + gaussian(6, 1, seed=1)  # channels with different means
    expected = nearest_level(weight.numpy(), bits, group_size)
    np.testing.assert_allclose(round_to_nearest(weight, bits, group_size).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rounding_is_torchaos_asymmetric_scheme(bits, group_size):
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = nn.Linear(64, 12).weight.detach()
    block = (1, group_size or 64)
    how = {"quant_min": 0, "quant_max": 2**bits - 1}
    kind = primitives.MappingType.ASYMMETRIC
    scale, zero = primitives.choose_qparams_affine(weight, kind, block, torch.uint8, **how)
    levels = primitives.quantize_affine(weight, block, scale, zero, torch.uint8, **how)
    expected = primitives.dequantize_affine(levels, block, scale, zero, torch.uint8, **how)
    torch.testing.assert_close(round_to_nearest(weight, bits, group_size), expected, rtol=0, atol=1e-7)


def test_zero_stays_zero_and_a_weight_of_zeros_is_no_problem():
    weight = gaussian(4, 8).abs()
    weight[:, 3] = 0
    assert (round_to_nearest(weight, 3)[:, 3] == 0).all()
    assert (round_to_nearest(torch.zeros(2, 4), 4) == 0).all()


def test_half_precision_is_rounded_in_single_precision():
    weight = gaussian(4, 8, dtype=torch.bfloat16)
    rounded = round_to_nearest(weight, 4)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded, round_to_nearest(weight.float(), 4).bfloat16())


@pytest.mark.parametrize("values", [{"bits": 0}, {"bits": 4, "group_size": 0}])
def test_rounding_refuses_what_has_no_levels(values):
    with pytest.raises(ValueError, match="must be at least 1"):
        round_to_nearest(torch.ones(2, 2), **values)


# --- which weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "outputs"),
    [
        (nn.Linear(6, 4), 4),
        (Conv1D(4, 6), 4),
        (nn.Conv2d(6, 4, 3), 4),
        (nn.ConvTranspose2d(6, 4, 3), 4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_output_channel_is_a_row(module, outputs):
    """Scaling one output channel must not change how the others are rounded."""
    matrix = weight_matrices(nn.Sequential(module))["0.weight"]
    shapes = []
    unchanged = matrix.map_rows(lambda rows: shapes.append(rows.shape) or rows)
    assert torch.equal(unchanged, module.weight)
    assert shapes == [(outputs, module.weight.numel() // outputs)]


def test_experts_in_one_tensor_have_channels_of_their_own():
    matrix = WeightMatrix(gaussian(3, 4, 8), (0, 1))
    rounded = matrix.map_rows(lambda rows: round_to_nearest(rows, 3))
    for expert in range(3):
        assert torch.equal(rounded[expert], round_to_nearest(matrix.weight[expert], 3))


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (bert(), "classifier.weight"),
        (ViT(ViTConfig(image_size=16, patch_size=8, num_labels=3, **SIZE)), "classifier.weight"),
        (gpt2(), None),
    ],
    ids=["bert", "vit", "gpt2"],
)
def test_embeddings_norms_biases_and_head_are_left_alone_unless_asked_for(model, head):
    names = weight_matrices(model).keys()
    assert names
    assert not [name for name in names if "embed" in name or "norm" in name or "bias" in name or "wte" in name]
    assert head not in names
    assert any("embed" in n or "wte" in n for n in weight_matrices(model, embeddings=True).keys() - names)
    if head is not None:
        assert weight_matrices(model, head=True).keys() - names == {head}


# --- the model gets its weights back -------------------------------------------------------------------------------


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_model_is_restored_bit_for_bit_also_after_an_error():
    model = bert()
    before, matrices = state_of(model), weight_matrices(model)
    with pytest.raises(RuntimeError, match="stop"), replaced(model, quantized(matrices, 2)):
        assert not same(before, state_of(model))
        raise RuntimeError("stop")
    assert same(before, state_of(model))
    wrong = {"classifier.weight": torch.zeros(3, 16), "classifier.bias": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"classifier.bias has the shape \(3,\), not \(2,\)"), replaced(model, wrong):
        pass
    assert same(before, state_of(model))


def test_tied_weights_stay_tied():
    model = gpt2()
    with replaced(model, quantized(weight_matrices(model, embeddings=True), 2)):
        assert model.lm_head.weight is model.transformer.wte.weight
        assert len(model.transformer.wte.weight[0].unique()) <= 4


# --- pruning, noise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.55, 0.7, 1.0])
def test_pruning_is_torchs_own(share):
    layer = nn.Linear(7, 5)
    expected = prune.l1_unstructured(copy.deepcopy(layer), "weight", amount=float(share)).weight
    assert torch.equal(prune_smallest(layer.weight, share), expected)
    assert torch.equal(pruned({"w": WeightMatrix(layer.weight, (0,))}, share)["w"], expected)


def test_pruning_refuses_more_than_everything():
    with pytest.raises(ValueError, match=r"share=1.5 must be in \[0, 1\]"):
        prune_smallest(torch.ones(2, 2), 1.5)


def test_noise_has_the_size_it_says_and_the_same_seed_draws_the_same():
    weight = 3 + 0.2 * gaussian(300, 300)
    change = add_noise(weight, 0.5, torch.Generator().manual_seed(0)) - weight
    assert change.std().item() == pytest.approx(0.1, rel=0.02)
    assert change.mean().item() == pytest.approx(0, abs=1e-3)
    matrices = weight_matrices(bert())
    first, again, other = noisy(matrices, 0.1, 0), noisy(matrices, 0.1, 0), noisy(matrices, 0.1, 1)
    assert same(first, again)
    assert not any(torch.equal(first[name], other[name]) for name in first)


# --- merging -------------------------------------------------------------------------------------------------------


def test_a_classifier_keeps_its_own_head_and_a_language_model_is_merged_whole():
    model = bert()
    assert model.state_dict().keys() - mergeable_state(model).keys() >= {"classifier.weight", "classifier.bias"}
    assert "bert.embeddings.word_embeddings.weight" in mergeable_state(model)
    assert mergeable_state(gpt2()).keys() == dict(gpt2().named_parameters()).keys()


def test_running_statistics_are_merged_with_the_weights():
    assert "1.running_var" in mergeable_state(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_merges_are_what_their_formulas_say():
    start, first, second = ({"w": gaussian(3, 4, seed=seed)} for seed in range(3))
    np.testing.assert_array_equal(interpolate(first, second, 0.0)["w"], first["w"])
    np.testing.assert_array_equal(interpolate(first, second, 1.0)["w"], second["w"])
    average = (first["w"].numpy() + second["w"].numpy()) / 2
    np.testing.assert_allclose(interpolate(first, second, 0.5)["w"], average, atol=1e-15)
    np.testing.assert_allclose(task_arithmetic(start, [first, second], 0.5)["w"], average, atol=1e-15)
    both = first["w"].numpy() + second["w"].numpy() - start["w"].numpy()
    np.testing.assert_allclose(task_arithmetic(start, [first, second], 1.0)["w"], both, atol=1e-15)


def test_another_architecture_is_not_merged():
    own = mergeable_state(bert())
    check_same_shapes(own, mergeable_state(bert(seed=1, num_labels=7)))  # heads do not matter
    with pytest.raises(ValueError, match=r"b has a different architecture: its tensors differ \(bert.encoder.layer.1"):
        check_same_shapes(own, mergeable_state(bert(num_hidden_layers=2)), "b")
    with pytest.raises(
        ValueError, match=r"b: bert.embeddings.word_embeddings.weight has the shape \(21, 16\) instead of \(20, 16\)"
    ):
        check_same_shapes(own, mergeable_state(bert(vocab_size=21)), "b")


# --- what libraries do ---------------------------------------------------------------------------------------------


def test_dynamic_int8_quantizes_a_copy_without_its_head():
    model = bert()
    before = state_of(model)
    quantized_model = dynamic_int8(model, weight_matrices(model))
    kinds = {name: type(module).__module__ for name, module in quantized_model.named_modules()}
    assert "quantized.dynamic" in kinds["bert.encoder.layer.0.intermediate.dense"]
    assert kinds["classifier"] == "torch.nn.modules.linear"
    assert same(before, state_of(model))
    tokens = torch.arange(8)[None]
    difference = (quantized_model(tokens).logits - model(tokens).logits).abs().max()
    assert 0 < difference < 0.05


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_model_loads_through_each_library_without_its_head(name):
    pytest.importorskip(name.split("-")[0])
    model = bert(hidden_size=64, intermediate_size=64)
    before, tokens = state_of(model), torch.arange(8)[None]
    with loaded_by_library(model, name, weight_matrices(model)) as loaded:
        difference = (loaded(tokens).logits - model(tokens).logits).abs().max()
        assert 0 < difference < 0.2
        assert type(loaded.classifier.weight) in (torch.Tensor, nn.Parameter)
        assert torch.equal(loaded.classifier.weight, model.classifier.weight)
        assert type(loaded.bert.encoder.layer[0].output.dense.weight) is not nn.Parameter
    assert same(before, state_of(model))
