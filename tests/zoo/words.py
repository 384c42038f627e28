"""A tokenizer, sentences and small language models for trainers that want text."""

from __future__ import annotations

import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    set_seed,
)

VOCABULARY = ["<pad>", "<s>", "</s>", "<unk>", *(f"{a}{b}" for a in "bdfgklmnprst" for b in "aeiou")]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        chat_template="{% for turn in messages %}{{ turn['content'] }} {% endfor %}",
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
    )


def sentence(seed: int, length: int) -> str:
    """`length` words, always the same for a seed."""
    dice = random.Random(seed)
    return " ".join(dice.choice(VOCABULARY[4:]) for _ in range(length))


def _config(**options) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=32,
        attention_dropout=0.1,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )


def language_model() -> LlamaForCausalLM:
    set_seed(0)
    return LlamaForCausalLM(_config())


def reward_model() -> LlamaForSequenceClassification:
    set_seed(0)
    return LlamaForSequenceClassification(_config(num_labels=1))
