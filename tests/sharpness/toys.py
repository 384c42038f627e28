"""Small models and data with known or independently computable curvature."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_sam.sharpness import Subset

TINY = {
    "vocab_size": 7,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 4,
    "max_position_embeddings": 8,
    "initializer_range": 0.5,
}


class Quadratic(nn.Module):
    """`L(w) = mean_n 1/2 (w - x_n)^T A (w - x_n)`: the Hessian is A, the gradient `A (w - mean x)`."""

    def __init__(self, matrix: Tensor, weights: Tensor):
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.first = nn.Parameter(weights[:1].clone())  # two tensors, so that flattening has something to do
        self.rest = nn.Parameter(weights[1:].clone())

    def forward(self, x: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        distance = torch.cat([self.first, self.rest]) - x  # (batch, P)
        return SequenceClassifierOutput(loss=0.5 * ((distance @ self.matrix) * distance).sum(1).mean())


class NormedNet(nn.Module):
    """A classifier with batch normalisation, whose statistics are not those of the data that it is measured on."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))
        self.layers[1].running_mean.normal_(generator=torch.Generator().manual_seed(1))
        self.layers[1].running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))

    def forward(self, x: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        logits = self.layers(x)
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def quadratic(matrix: Tensor, gradient: Tensor) -> tuple[Quadratic, Subset]:
    """A quadratic with Hessian `matrix` and this gradient at its weights, averaged over seven examples."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(len(matrix), generator=generator, dtype=torch.float64)
    x = torch.randn(7, len(matrix), generator=generator, dtype=torch.float64)
    x += weights - torch.linalg.solve(matrix, gradient) - x.mean(0)
    examples = [{"x": row.numpy(), "labels": 0} for row in x]
    return Quadratic(matrix, weights).double(), Subset(examples, collate, batch_size=3)


def collate(examples: list[dict]) -> dict[str, Tensor]:
    """Stack; sequences are padded on the right, labels with -100."""
    batch = {}
    for name in examples[0]:
        values = [torch.as_tensor(example[name]) for example in examples]
        fill = -100 if name == "labels" else 0
        batch[name] = (
            nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
            if values[0].ndim
            else torch.stack(values)
        )
    return batch


def normed_net() -> tuple[NormedNet, list[dict]]:
    torch.manual_seed(3)
    examples = [{"x": torch.randn(4).numpy(), "labels": i % 3} for i in range(11)]
    return NormedNet(), examples


def bert(**config) -> tuple[PreTrainedModel, list[dict]]:
    """A sequence classifier with texts of different lengths."""
    torch.manual_seed(4)
    model = BertForSequenceClassification(BertConfig(**TINY, num_labels=3, **config))
    return model, [{**_text(2 + i % 4, 7), "labels": i % 3} for i in range(7)]


def tied_masked_lm() -> tuple[PreTrainedModel, list[dict]]:
    """A masked language model with tied embeddings; the number of masked tokens differs from text to text."""
    torch.manual_seed(7)
    return BertForMaskedLM(BertConfig(**TINY)), _continuations(7)


def tied_gpt2() -> tuple[PreTrainedModel, list[dict]]:
    """A causal language model with tied embeddings; every third text has only its second half for a target."""
    torch.manual_seed(5)
    config = GPT2Config(
        vocab_size=9,
        n_embd=4,
        n_layer=1,
        n_head=2,
        n_inner=4,
        n_positions=8,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config), _continuations(7)


def llama() -> tuple[PreTrainedModel, list[dict]]:
    """A causal language model with gated SiLU units, whose normalisation always computes in float32."""
    torch.manual_seed(6)
    config = LlamaConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=8,
        max_position_embeddings=16,
        initializer_range=0.5,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config), _continuations(9)


def _continuations(vocabulary: int) -> list[dict]:
    examples = []
    for i in range(6):
        text = _text(3 + i % 4, vocabulary)
        labels = text["input_ids"].copy()
        if i % 3 == 0:
            labels[: len(labels) // 2] = -100
        examples.append({**text, "labels": labels})
    return examples


def _text(length: int, vocabulary: int) -> dict:
    ids = torch.randint(1, vocabulary, (length,))
    return {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}


def assert_same(before, after) -> None:
    """Bitwise equality of nested states."""
    if isinstance(before, torch.Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            assert_same(before[key], after[key])
    elif isinstance(before, (list, tuple)):
        assert len(before) == len(after)
        for a, b in zip(before, after, strict=True):
            assert_same(a, b)
    elif isinstance(before, np.ndarray):
        np.testing.assert_array_equal(before, after)
    else:
        assert before == after
