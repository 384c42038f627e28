"""Architectures of transformers in a size of a few thousand parameters, with data for the losses that they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Trainer, default_data_collator, set_seed

VOCABULARY = 32
CLASSES = 3
Examples = list[dict[str, Any]]
Field = Callable[[torch.Generator, int], Any]


@dataclass(frozen=True)
class Architecture:
    """One model, its data and what is special in its run.

    Args:
        model (`str`): Name of the class.
        config (`dict`): Arguments of its configuration.
        data (`Callable`): Returns the examples.
        collate (`Callable`, *optional*): The data collator, where stacking tensors is not enough.
        arguments (`dict`, *optional*): Of the training arguments.
        trainer (`str`, *optional*, defaults to `"Trainer"`): Name of the class.
        checks_predictions (`bool`, *optional*, defaults to `True`): Evaluate the predictions, too; False where they are
            of different shapes from batch to batch, which no trainer can put together.
        prepare (`Callable`, *optional*): Called with the new model.
    """

    model: str
    config: dict[str, Any]
    data: Callable[[], Examples]
    collate: Callable[[Examples], dict[str, Any]] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    trainer: str = "Trainer"
    checks_predictions: bool = True
    prepare: Callable[[torch.nn.Module], None] | None = None

    @property
    def stock(self) -> type[Trainer]:
        return getattr(transformers, self.trainer)

    def build(self) -> torch.nn.Module:
        """The model, always with the same weights."""
        set_seed(0)
        cls = getattr(transformers, self.model)
        model = cls(cls.config_class(**self.config))
        # Where a weight is exactly 0, 1e-30 is not lost to rounding, and a ReLU has its kink.
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.01)
        if self.prepare is not None:
            self.prepare(model)
        return model


# --- data ------------------------------------------------------------------------------------------------------------


def examples(count: int = 8, **fields: Field) -> Examples:
    """`count` examples; each field draws its value from a generator with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return [{name: draw(generator, i) for name, draw in fields.items()} for i in range(count)]


def of(**fields: Field) -> Callable[[], Examples]:
    return lambda: examples(**fields)


def ids(*shape: int, low: int = 3, high: int = VOCABULARY) -> Field:
    return lambda generator, i: torch.randint(low, high, shape, generator=generator)


def number(high: int = CLASSES, low: int = 0) -> Field:
    """An integer that is no tensor, as class labels are in most data sets."""
    return lambda generator, i: int(torch.randint(low, high, (), generator=generator))


def reals(*shape: int) -> Field:
    return lambda generator, i: torch.randn(*shape, generator=generator)


def positive(*shape: int) -> Field:
    return lambda generator, i: torch.rand(*shape, generator=generator) + 0.5


def constant(value: Any) -> Field:
    return lambda generator, i: value


def growing(generator: torch.Generator, i: int) -> Tensor:
    """A sequence to be cut to 7 or 10 tokens, and from the second half of the data on to 13 or 16."""
    tokens = torch.randint(3, VOCABULARY, (16,), generator=generator)
    tokens[0] = 7 + 3 * (i // 2)
    return tokens


def padding(length: int) -> Field:
    """An attention mask; every third example is whole, the others end one or two tokens earlier."""
    return lambda generator, i: (torch.arange(length) < length - i % 3).long()


def ignoring(draw: Field, first: int = 0) -> Field:
    """Labels of which some are left out of the loss."""

    def labels(generator: torch.Generator, i: int) -> Tensor:
        values = draw(generator, i)
        values[..., first : first + 1 + i % 3] = -100
        return values

    return labels


def masked_at_random(features: Examples) -> dict[str, Any]:
    """Masks a quarter of the tokens, other ones each time that an example is seen."""
    batch = default_data_collator(features)
    chosen = torch.rand(batch["input_ids"].shape) < 0.25
    chosen[:, 0] = True
    batch["labels"] = torch.where(chosen, batch["input_ids"], -100)
    batch["input_ids"] = torch.where(chosen, 1, batch["input_ids"])
    return batch


def cut_short(features: Examples) -> dict[str, Any]:
    """Each batch of sequences is as long as its first token says."""
    length = int(features[0]["input_ids"][0])
    return {name: value[:, :length] for name, value in default_data_collator(features).items()}


def with_loss(features: Examples) -> dict[str, Any]:
    """Asks the model for its contrastive loss by an entry that is no tensor, and comes first."""
    return {"return_loss": True, **default_data_collator(features)}


def detection(features: Examples) -> dict[str, Any]:
    """Boxes are a list of dictionaries, one for each image, of different lengths."""
    return {
        "labels": [feature["labels"] for feature in features],
        "pixel_values": torch.stack([feature["pixel_values"] for feature in features]),
    }


def boxes(generator: torch.Generator, i: int) -> dict[str, Tensor]:
    count = 1 + i % 2
    return {
        "class_labels": torch.randint(CLASSES, (count,), generator=generator),
        "boxes": 0.3 + 0.2 * torch.rand(count, 4, generator=generator),
    }


# --- parts of configurations -----------------------------------------------------------------------------------------

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {
    **SIZE,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "use_cache": False, "attention_dropout": 0.1}
IMAGE = {**SIZE, "image_size": 16, "patch_size": 4, "num_labels": CLASSES}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
SPEECH = {
    **SIZE,
    "vocab_size": VOCABULARY,
    "conv_dim": (8, 8, 8),
    "conv_stride": (4, 2, 2),
    "conv_kernel": (8, 3, 3),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.3,
    "mask_time_length": 2,
    "mask_feature_prob": 0.2,
    "mask_feature_length": 2,
    "num_labels": CLASSES,
    "classifier_proj_size": 8,
}
BACKBONE = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
RESNET = {"model_type": "resnet", **BACKBONE, "out_features": ["stage2", "stage3", "stage4"]}
EFFICIENT = {
    "image_size": 32,
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "depth_divisor": 4,
    "kernel_sizes": [3, 3, 5],
    "in_channels": [32, 8, 12],
    "out_channels": [8, 12, 16],
    "strides": [1, 1, 2],
    "num_block_repeats": [1, 1, 2],
    "expand_ratios": [1, 6, 6],
    "drop_connect_rate": 0.3,
    "hidden_dim": 1280,
}
GENERATES = {"trainer": "Seq2SeqTrainer", "arguments": {"predict_with_generate": True, "generation_max_length": 6}}

LENGTH = 8
classified = of(input_ids=ids(LENGTH), attention_mask=padding(LENGTH), labels=number())
tagged = of(input_ids=ids(LENGTH), labels=ignoring(ids(LENGTH, low=0, high=CLASSES)))
unmasked = of(input_ids=ids(LENGTH), attention_mask=padding(LENGTH))
causal = of(input_ids=ids(LENGTH), labels=ignoring(ids(LENGTH)))
spans = of(input_ids=ids(LENGTH), start_positions=number(4), end_positions=number(8, 4))
choices = of(input_ids=ids(CLASSES, LENGTH), labels=number())
replaced = of(input_ids=ids(LENGTH), attention_mask=padding(LENGTH), labels=ids(LENGTH, low=0, high=2))
translated = of(input_ids=ids(LENGTH), attention_mask=padding(LENGTH), labels=ignoring(ids(6), 3))
pictures = of(pixel_values=reals(3, 16, 16), labels=number())
larger_pictures = of(pixel_values=reals(3, 32, 32), labels=number())
bare_pictures = of(pixel_values=reals(3, 16, 16))
scenes = of(pixel_values=reals(3, 32, 32), labels=boxes)
waves = of(input_values=reals(512), labels=number())
spoken = of(input_values=reals(512), labels=ignoring(ids(4), 3))
captioned = of(pixel_values=reals(3, 16, 16), labels=ids(6))
paired = of(input_ids=ids(LENGTH), attention_mask=padding(LENGTH), pixel_values=reals(3, 16, 16))

# --- the zoo ---------------------------------------------------------------------------------------------------------

A = Architecture
ENCODERS = {
    "BERT, masked words": A("BertForMaskedLM", TEXT, unmasked, collate=masked_at_random),
    "BERT, multiple choice": A("BertForMultipleChoice", TEXT, choices),
    "BERT, next sentence": A(
        "BertForPreTraining", TEXT, of(input_ids=ids(8), labels=ids(8), next_sentence_label=number(2))
    ),
    "RoBERTa, questions": A("RobertaForQuestionAnswering", TEXT, spans),
    "DistilBERT, tokens": A(
        "DistilBertForTokenClassification",
        {"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "num_labels": CLASSES},
        tagged,
    ),
    "ELECTRA, replaced words": A("ElectraForPreTraining", {**TEXT, "embedding_size": 8}, replaced),
    "ALBERT, shared layers": A(
        "AlbertForSequenceClassification",
        {
            **TEXT,
            "embedding_size": 8,
            "num_labels": CLASSES,
            "hidden_dropout_prob": 0.1,
            "classifier_dropout_prob": 0.1,
        },
        classified,
    ),
    "DeBERTa": A(
        "DebertaForSequenceClassification",
        {**TEXT, "num_labels": CLASSES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        classified,
    ),
    "DeBERTa-v2": A(
        "DebertaV2ForSequenceClassification",
        {
            **TEXT,
            "num_labels": CLASSES,
            "relative_attention": True,
            "position_buckets": 4,
            "pos_att_type": ["c2p", "p2c"],
            "conv_kernel_size": 3,
        },
        classified,
    ),
    "Longformer": A(
        "LongformerForSequenceClassification",
        {**TEXT, "num_labels": CLASSES, "attention_window": 4},
        classified,
    ),
    "BigBird, random blocks": A(
        "BigBirdForMaskedLM",
        {**TEXT, "attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 2},
        of(input_ids=ids(32)),
        collate=masked_at_random,
    ),
    "XLNet, questions": A(
        "XLNetForQuestionAnsweringSimple",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
        spans,
    ),
    "XLM": A(
        "XLMForSequenceClassification",
        {"vocab_size": VOCABULARY, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "num_labels": CLASSES},
        classified,
    ),
    "Funnel": A(
        "FunnelForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "block_sizes": [1, 1],
            "d_model": 16,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 32,
            "num_decoder_layers": 1,
            "num_labels": CLASSES,
        },
        classified,
    ),
    "MPNet": A("MPNetForTokenClassification", {**TEXT, "num_labels": CLASSES}, tagged),
    "CANINE": A(
        "CanineForSequenceClassification",
        {
            **SIZE,
            "max_position_embeddings": 64,
            "num_hash_buckets": 64,
            "num_hash_functions": 2,
            "downsampling_rate": 2,
            "local_transformer_stride": 8,
            "upsampling_kernel_size": 2,
            "num_labels": CLASSES,
        },
        of(input_ids=ids(16), labels=number()),
    ),
    "FNet": A("FNetForMaskedLM", TEXT, unmasked, collate=masked_at_random),
    "I-BERT, quantised": A(
        "IBertForSequenceClassification", {**TEXT, "num_labels": CLASSES, "quant_mode": True}, classified
    ),
    "YOSO": A(
        "YosoForSequenceClassification",
        {**TEXT, "num_labels": CLASSES, "use_expectation": True, "hash_code_len": 3},
        classified,
    ),
    "Nystromformer": A(
        "NystromformerForMaskedLM",
        {**TEXT, "num_landmarks": 4, "segment_means_seq_len": LENGTH, "conv_kernel_size": 3},
        of(input_ids=ids(LENGTH)),
        collate=masked_at_random,
    ),
    "ConvBERT": A(
        "ConvBertForSequenceClassification", {**TEXT, "embedding_size": 16, "num_labels": CLASSES}, classified
    ),
    "SqueezeBERT": A(
        "SqueezeBertForSequenceClassification",
        {
            **TEXT,
            "embedding_size": 16,
            "num_labels": CLASSES,
            "q_groups": 2,
            "k_groups": 2,
            "v_groups": 2,
            "post_attention_groups": 2,
            "intermediate_groups": 2,
            "output_groups": 2,
        },
        classified,
    ),
    "ModernBERT": A(
        "ModernBertForMaskedLM",
        {
            **TEXT,
            "local_attention": 4,
            "embedding_dropout": 0.1,
            "mlp_dropout": 0.1,
            "attention_dropout": 0.1,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        unmasked,
        collate=masked_at_random,
    ),
    "RemBERT": A(
        "RemBertForMaskedLM",
        {**TEXT, "input_embedding_size": 8, "output_embedding_size": 8},
        unmasked,
        collate=masked_at_random,
    ),
    "MobileBERT": A(
        "MobileBertForSequenceClassification",
        {**TEXT, "embedding_size": 8, "intra_bottleneck_size": 16, "true_hidden_size": 16, "num_labels": CLASSES},
        classified,
    ),
    "LayoutLM": A(
        "LayoutLMForTokenClassification",
        {**TEXT, "max_2d_position_embeddings": 64, "num_labels": CLASSES},
        of(input_ids=ids(8), bbox=lambda g, i: torch.tensor([[1, 2, 9, 20]] * 8), labels=ids(8, low=0, high=CLASSES)),
    ),
    "Perceiver": A(
        "PerceiverForMaskedLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_latents": 16,
            "num_latents": 4,
            "num_blocks": 1,
            "num_self_attends_per_block": 1,
            "num_self_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "max_position_embeddings": 8,
            "qk_channels": 16,
            "v_channels": 16,
        },
        of(input_ids=ids(8)),
        collate=masked_at_random,
    ),
}

DECODERS = {
    "GPT-2": A(
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "use_cache": False,
        },
        causal,
    ),
    "GPT-2, two heads": A(
        "GPT2DoubleHeadsModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "use_cache": False,
            "num_labels": 1,
        },
        of(input_ids=ids(2, 8), mc_token_ids=constant(torch.tensor([7, 7])), labels=ids(2, 8), mc_labels=number(2)),
        arguments={"label_names": ["labels", "mc_labels"]},
    ),
    "GPT-Neo": A(
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "intermediate_size": 32,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 16,
            "embed_dropout": 0.1,
            "attention_dropout": 0.1,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "use_cache": False,
        },
        causal,
    ),
    "GPT-NeoX": A("GPTNeoXForCausalLM", {**DECODER, "hidden_dropout": 0.1}, causal),
    "GPT-J": A(
        "GPTJForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 16,
            "rotary_dim": 4,
            "resid_pdrop": 0.1,
            "embd_pdrop": 0.1,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "use_cache": False,
        },
        causal,
    ),
    "Llama": A("LlamaForCausalLM", DECODER, causal),
    "Llama, classifying": A("LlamaForSequenceClassification", {**DECODER, "num_labels": CLASSES}, classified),
    "Llama, frequencies that follow the length": A(
        "LlamaForCausalLM",
        {
            **DECODER,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            "max_position_embeddings": 6,
        },
        of(input_ids=growing, labels=ids(16)),
        collate=cut_short,
        arguments={"train_sampling_strategy": "sequential"},
        checks_predictions=False,
    ),
    "Phi-3, two lengths of rope": A(
        "Phi3ForCausalLM",
        {
            **DECODER,
            "head_dim": 8,
            "original_max_position_embeddings": 6,
            "max_position_embeddings": 40,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 6,
            },
            "resid_pdrop": 0.1,
        },
        of(input_ids=growing, labels=ids(16)),
        collate=cut_short,
        arguments={"train_sampling_strategy": "sequential"},
        checks_predictions=False,
    ),
    "Mistral": A("MistralForCausalLM", {**DECODER, "sliding_window": 4}, causal),
    "Mixtral, router's loss": A(
        "MixtralForCausalLM",
        {**DECODER, "num_local_experts": 4, "output_router_logits": True, "router_jitter_noise": 0.1},
        causal,
    ),
    "Gemma": A("GemmaForCausalLM", DECODER, causal),
    "Gemma 2": A("Gemma2ForCausalLM", {**DECODER, "sliding_window": 4, "query_pre_attn_scalar": 8}, causal),
    "Qwen2": A("Qwen2ForCausalLM", DECODER, causal),
    "Qwen3": A("Qwen3ForCausalLM", DECODER, causal),
    "Qwen2-MoE": A(
        "Qwen2MoeForCausalLM",
        {
            **DECODER,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "output_router_logits": True,
        },
        causal,
    ),
    "OLMoE": A("OlmoeForCausalLM", {**DECODER, "num_experts": 4, "num_experts_per_tok": 2}, causal),
    "DeepSeek-V3": A(
        "DeepseekV3ForCausalLM",
        {
            **DECODER,
            "num_key_value_heads": 2,
            "head_dim": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
        causal,
    ),
    "Bloom": A(
        "BloomForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "n_layer": 2,
            "n_head": 2,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
            "use_cache": False,
        },
        causal,
    ),
    "Falcon": A("FalconForCausalLM", {**TEXT, "hidden_dropout": 0.1, "alibi": True, "use_cache": False}, causal),
    "OPT": A(
        "OPTForCausalLM",
        {**TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16, "layerdrop": 0.2, "use_cache": False},
        causal,
    ),
    "MPT": A(
        "MptForCausalLM",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 16, "use_cache": False},
        causal,
    ),
    "XGLM": A(
        "XGLMForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "num_layers": 2,
            "attention_heads": 2,
            "ffn_dim": 32,
            "layerdrop": 0.2,
            "max_position_embeddings": 40,
            "use_cache": False,
        },
        causal,
    ),
    "Mamba": A(
        "MambaForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "state_size": 4,
            "num_hidden_layers": 2,
            "time_step_rank": 4,
            "use_cache": False,
        },
        causal,
    ),
    "Mamba 2": A(
        "Mamba2ForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "state_size": 4,
            "num_hidden_layers": 2,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 4,
            "use_cache": False,
        },
        causal,
    ),
    "Falcon Mamba": A(
        "FalconMambaForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "state_size": 4,
            "num_hidden_layers": 2,
            "time_step_rank": 4,
            "use_cache": False,
        },
        causal,
    ),
    "RWKV": A(
        "RwkvForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "attention_hidden_size": 16,
            "num_hidden_layers": 2,
            "intermediate_size": 32,
            "context_length": 16,
            "use_cache": False,
        },
        of(input_ids=ids(8), labels=ids(8)),
    ),
    "RecurrentGemma": A(
        "RecurrentGemmaForCausalLM",
        {**DECODER, "num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 8, "use_cache": False},
        causal,
    ),
    "Jamba": A(
        "JambaForCausalLM",
        {
            **DECODER,
            "num_hidden_layers": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
            "output_router_logits": True,
        },
        causal,
    ),
    "xLSTM": A(
        "xLSTMForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_heads": 2,
            "chunk_size": 4,
            "mode": "train",
            "use_cache": False,
        },
        causal,
    ),
    "LFM2": A(
        "Lfm2ForCausalLM", {**DECODER, "num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, causal
    ),
    "Qwen3-Next, gated delta rule": A(
        "Qwen3NextForCausalLM",
        {
            **DECODER,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        causal,
    ),
}

SEQUENCES = {
    "T5, generating": A("T5ForConditionalGeneration", T5, translated, **GENERATES),
    "BART, generating": A("BartForConditionalGeneration", SEQ2SEQ, translated, **GENERATES),
    "BART, layers left out": A(
        "BartForConditionalGeneration",
        {**SEQ2SEQ, "encoder_layerdrop": 0.3, "decoder_layerdrop": 0.3},
        translated,
        trainer="Seq2SeqTrainer",
    ),
    "BART, classifying": A(
        "BartForSequenceClassification",
        {**SEQ2SEQ, "num_labels": CLASSES},
        of(
            input_ids=lambda g, i: torch.cat([torch.randint(3, 32, (7,), generator=g), torch.tensor([2])]),
            labels=number(),
        ),
    ),
    "Pegasus": A("PegasusForConditionalGeneration", SEQ2SEQ, translated, **GENERATES),
    "Marian": A("MarianMTModel", SEQ2SEQ, translated, **GENERATES),
    "M2M100": A("M2M100ForConditionalGeneration", SEQ2SEQ, translated, **GENERATES),
    "LED": A(
        "LEDForConditionalGeneration",
        {
            **SEQ2SEQ,
            "attention_window": [4, 4],
            "max_encoder_position_embeddings": 40,
            "max_decoder_position_embeddings": 40,
        },
        translated,
        **GENERATES,
    ),
    "LongT5": A(
        "LongT5ForConditionalGeneration",
        {**T5, "local_radius": 2, "global_block_size": 4, "encoder_attention_type": "transient-global"},
        translated,
        **GENERATES,
    ),
    "Switch Transformer": A(
        "SwitchTransformersForConditionalGeneration",
        {
            **T5,
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "expert_capacity": 4,
            "router_jitter_noise": 0.1,
            "router_z_loss_coef": 0.01,
            "router_aux_loss_coef": 0.01,
        },
        translated,
        trainer="Seq2SeqTrainer",
    ),
    "NLLB-MoE": A(
        "NllbMoeForConditionalGeneration",
        {
            **SEQ2SEQ,
            "num_experts": 4,
            "expert_capacity": 8,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "moe_token_dropout": 0.2,
            "router_jitter_noise": 0.1,
        },
        translated,
        trainer="Seq2SeqTrainer",
        checks_predictions=False,
    ),
    "ProphetNet": A(
        "ProphetNetForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "encoder_ffn_dim": 32,
            "num_encoder_layers": 2,
            "num_encoder_attention_heads": 2,
            "decoder_ffn_dim": 32,
            "num_decoder_layers": 2,
            "num_decoder_attention_heads": 2,
            "max_position_embeddings": 40,
            "ngram": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
            "disable_ngram_loss": False,
        },
        translated,
        **GENERATES,
    ),
    "Encoder-decoder of BERTs": A(
        "EncoderDecoderModel",
        {
            "encoder": {"model_type": "bert", **TEXT},
            "decoder": {"model_type": "bert", **TEXT, "is_decoder": True, "add_cross_attention": True},
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
        translated,
        **GENERATES,
    ),
}

PICTURES = {
    "ViT": A("ViTForImageClassification", {**IMAGE, "hidden_dropout_prob": 0.1}, pictures),
    "ViT, masked autoencoder": A(
        "ViTMAEForPreTraining",
        {
            **IMAGE,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
            "mask_ratio": 0.5,
        },
        bare_pictures,
    ),
    "DeiT": A("DeiTForImageClassification", {**IMAGE, "hidden_dropout_prob": 0.1}, pictures),
    "BEiT, layers left out": A("BeitForImageClassification", {**IMAGE, "drop_path_rate": 0.3}, pictures),
    "Swin": A(
        "SwinForImageClassification",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "window_size": 2,
            "drop_path_rate": 0.3,
            "num_labels": CLASSES,
        },
        pictures,
    ),
    "Swin v2": A(
        "Swinv2ForImageClassification",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "window_size": 2,
            "drop_path_rate": 0.3,
            "num_labels": CLASSES,
        },
        pictures,
    ),
    "DINOv2": A("Dinov2ForImageClassification", {**IMAGE, "mlp_ratio": 2, "drop_path_rate": 0.3}, pictures),
    "ResNet, BatchNorm": A("ResNetForImageClassification", {**BACKBONE, "num_labels": CLASSES}, larger_pictures),
    "RegNet, BatchNorm": A(
        "RegNetForImageClassification",
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 8, 8, 16],
            "depths": [1, 1, 1, 1],
            "groups_width": 4,
            "num_labels": CLASSES,
        },
        larger_pictures,
    ),
    "MobileNetV1, BatchNorm": A(
        "MobileNetV1ForImageClassification",
        {"depth_multiplier": 0.25, "image_size": 32, "num_labels": CLASSES},
        larger_pictures,
    ),
    "MobileNetV2, BatchNorm": A(
        "MobileNetV2ForImageClassification",
        {"depth_multiplier": 0.25, "image_size": 32, "num_labels": CLASSES, "finegrained_output": False},
        larger_pictures,
    ),
    "MobileNetV2, segmenting": A(
        "MobileNetV2ForSemanticSegmentation",
        {"depth_multiplier": 0.25, "image_size": 32, "num_labels": CLASSES, "finegrained_output": False},
        of(pixel_values=reals(3, 32, 32), labels=ids(32, 32, low=0, high=CLASSES)),
    ),
    "EfficientNet, BatchNorm": A(
        "EfficientNetForImageClassification",
        {**EFFICIENT, "num_labels": CLASSES},
        larger_pictures,
    ),
    "ConvNeXt": A(
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "drop_path_rate": 0.3, "num_labels": CLASSES},
        larger_pictures,
    ),
    "ConvNeXt v2": A(
        "ConvNextV2ForImageClassification",
        {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "drop_path_rate": 0.3, "num_labels": CLASSES},
        larger_pictures,
    ),
    "LeViT, BatchNorm": A(
        "LevitForImageClassification",
        {
            "image_size": 32,
            "hidden_sizes": [16, 16, 16],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            "num_labels": CLASSES,
            "patch_size": 16,
        },
        larger_pictures,
    ),
    "PoolFormer": A(
        "PoolFormerForImageClassification",
        {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "drop_path_rate": 0.3, "num_labels": CLASSES},
        larger_pictures,
    ),
    "SegFormer": A(
        "SegformerForSemanticSegmentation",
        {
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 8,
            "drop_path_rate": 0.3,
            "num_labels": CLASSES,
        },
        of(pixel_values=reals(3, 16, 16), labels=ids(16, 16, low=0, high=CLASSES)),
    ),
    "UPerNet": A(
        "UperNetForSemanticSegmentation",
        {
            "backbone_config": {**RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
            "hidden_size": 8,
            "pool_scales": [1, 2],
            "auxiliary_channels": 8,
            "auxiliary_in_channels": 16,
            "num_labels": CLASSES,
        },
        of(pixel_values=reals(3, 32, 32), labels=ids(32, 32, low=0, high=CLASSES)),
    ),
    "DPT": A(
        "DPTForSemanticSegmentation",
        {
            **IMAGE,
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "reassemble_factors": [4, 2, 1, 0.5],
            "use_batch_norm_in_fusion_residual": True,
        },
        of(pixel_values=reals(3, 16, 16), labels=ids(16, 16, low=0, high=CLASSES)),
    ),
    "MaskFormer": A(
        "MaskFormerForInstanceSegmentation",
        {
            "backbone_config": {**RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
            "decoder_config": {
                "model_type": "detr",
                "d_model": 16,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 16,
                "decoder_ffn_dim": 16,
                "num_queries": 4,
                "use_timm_backbone": False,
                "backbone_config": RESNET,
                "num_labels": CLASSES,
            },
            "fpn_feature_size": 32,
            "mask_feature_size": 32,
            "num_labels": CLASSES,
        },
        of(
            pixel_values=reals(3, 32, 32),
            mask_labels=lambda g, i: (torch.rand(2, 32, 32, generator=g) > 0.5).float(),
            class_labels=ids(2, low=0, high=CLASSES),
        ),
        collate=lambda features: {
            "pixel_values": torch.stack([f["pixel_values"] for f in features]),
            "mask_labels": [f["mask_labels"] for f in features],
            "class_labels": [f["class_labels"] for f in features],
        },
        arguments={"label_names": ["mask_labels", "class_labels"]},
        checks_predictions=False,
    ),
    "YOLOS": A(
        "YolosForObjectDetection",
        {
            **SIZE,
            "image_size": [32, 32],
            "patch_size": 8,
            "num_detection_tokens": 4,
            "hidden_dropout_prob": 0.1,
            "num_labels": CLASSES,
        },
        scenes,
        collate=detection,
        checks_predictions=False,
    ),
    "DETR": A(
        "DetrForObjectDetection",
        {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "num_queries": 4,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": RESNET,
            "auxiliary_loss": True,
            "num_labels": CLASSES,
        },
        scenes,
        collate=detection,
        checks_predictions=False,
    ),
    "Deformable DETR": A(
        "DeformableDetrForObjectDetection",
        {
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "num_queries": 4,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": RESNET,
            "num_feature_levels": 3,
            "encoder_n_points": 2,
            "decoder_n_points": 2,
            "disable_custom_kernels": True,
            "num_labels": CLASSES,
        },
        scenes,
        collate=detection,
        checks_predictions=False,
    ),
    "RT-DETR, denoising queries": A(
        "RTDetrForObjectDetection",
        {
            "d_model": 16,
            "encoder_hidden_dim": 16,
            "encoder_in_channels": [8, 16, 16],
            "feat_strides": [8, 16, 32],
            "encoder_ffn_dim": 16,
            "encoder_attention_heads": 2,
            "encode_proj_layers": [2],
            "decoder_layers": 2,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 16,
            "decoder_in_channels": [16, 16, 16],
            "decoder_n_points": 2,
            "num_queries": 6,
            "num_denoising": 4,
            "learn_initial_query": False,
            "hidden_expansion": 1.0,
            "num_labels": CLASSES,
            "backbone_config": {
                "model_type": "rt_detr_resnet",
                **BACKBONE,
                "depths": [1, 1, 1, 1],
                "out_features": ["stage2", "stage3", "stage4"],
            },
        },
        of(pixel_values=reals(3, 64, 64), labels=boxes),
        collate=detection,
        checks_predictions=False,
    ),
    "VideoMAE": A(
        "VideoMAEForVideoClassification",
        {**IMAGE, "num_frames": 2, "tubelet_size": 1, "hidden_dropout_prob": 0.1},
        of(pixel_values=reals(2, 3, 16, 16), labels=number()),
    ),
    "TimeSformer": A(
        "TimesformerForVideoClassification",
        {**IMAGE, "num_frames": 2, "hidden_dropout_prob": 0.1},
        of(pixel_values=reals(2, 3, 16, 16), labels=number()),
    ),
}

SOUNDS = {
    "wav2vec 2.0, CTC": A(
        "Wav2Vec2ForCTC", {**SPEECH, "feat_extract_norm": "group", "layerdrop": 0.2, "pad_token_id": 0}, spoken
    ),
    "wav2vec 2.0, pre-training": A(
        "Wav2Vec2ForPreTraining",
        {
            **SPEECH,
            "num_codevectors_per_group": 4,
            "num_codevector_groups": 2,
            "codevector_dim": 8,
            "proj_codevector_dim": 8,
            "num_negatives": 3,
            "layerdrop": 0.0,
        },
        of(
            input_values=reals(512),
            mask_time_indices=lambda g, i: torch.arange(31) % 3 == 0,
            sampled_negative_indices=lambda g, i: torch.randint(0, 31, (31, 3), generator=g),
        ),
        checks_predictions=False,
    ),
    "wav2vec 2.0 conformer, BatchNorm": A(
        "Wav2Vec2ConformerForCTC", {**SPEECH, "conv_depthwise_kernel_size": 5, "pad_token_id": 0}, spoken
    ),
    "HuBERT": A("HubertForSequenceClassification", {**SPEECH, "conv_pos_batch_norm": True}, waves),
    "WavLM": A(
        "WavLMForSequenceClassification",
        {**SPEECH, "num_buckets": 8, "max_bucket_distance": 16, "mask_feature_min_masks": 0},
        waves,
    ),
    "SEW": A("SEWForSequenceClassification", {**SPEECH, "squeeze_factor": 2}, waves),
    "UniSpeech-SAT": A("UniSpeechSatForSequenceClassification", SPEECH, waves),
    "AST": A(
        "ASTForAudioClassification",
        {
            **SIZE,
            "patch_size": 4,
            "max_length": 16,
            "num_mel_bins": 16,
            "frequency_stride": 4,
            "time_stride": 4,
            "hidden_dropout_prob": 0.1,
            "num_labels": CLASSES,
        },
        of(input_values=reals(16, 16), labels=number()),
    ),
    "Whisper": A(
        "WhisperForConditionalGeneration",
        {
            **SEQ2SEQ,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "dropout": 0.1,
            "apply_spec_augment": True,
            "mask_time_prob": 0.2,
            "mask_time_length": 2,
            "mask_feature_prob": 0.2,
            "mask_feature_length": 2,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
        of(input_features=reals(8, 32), labels=ignoring(ids(6), 3)),
        trainer="Seq2SeqTrainer",
        arguments={"predict_with_generate": True, "generation_max_length": 6},
    ),
    "Speech2Text": A(
        "Speech2TextForConditionalGeneration",
        {
            **SEQ2SEQ,
            "input_feat_per_channel": 8,
            "input_channels": 1,
            "conv_channels": 16,
            "num_conv_layers": 2,
            "conv_kernel_sizes": [5, 5],
            "max_source_positions": 32,
            "max_target_positions": 16,
            "dropout": 0.1,
        },
        of(input_features=reals(16, 8), attention_mask=constant(torch.ones(16, dtype=torch.long)), labels=ids(6)),
        trainer="Seq2SeqTrainer",
        arguments={"predict_with_generate": True, "generation_max_length": 6},
    ),
    "Speech encoder-decoder": A(
        "SpeechEncoderDecoderModel",
        {
            "encoder": {"model_type": "wav2vec2", **SPEECH},
            "decoder": {"model_type": "bert", **TEXT, "is_decoder": True, "add_cross_attention": True},
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
        of(input_values=reals(512), labels=ids(6)),
        trainer="Seq2SeqTrainer",
    ),
    "SpeechT5": A(
        "SpeechT5ForSpeechToText",
        {
            **SPEECH,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "decoder_start_token_id": 2,
            "encoder_layerdrop": 0.2,
            "decoder_layerdrop": 0.2,
        },
        of(input_values=reals(512), labels=ids(6)),
    ),
}

CLIP_TEXT = {**TEXT, "projection_dim": 8}
TOGETHER = {
    "CLIP, contrastive": A(
        "CLIPModel",
        {"text_config": CLIP_TEXT, "vision_config": {**IMAGE, "projection_dim": 8}, "projection_dim": 8},
        paired,
        collate=with_loss,
        checks_predictions=False,
    ),
    "SigLIP, contrastive": A(
        "SiglipModel",
        {"text_config": TEXT, "vision_config": IMAGE},
        paired,
        collate=with_loss,
        checks_predictions=False,
    ),
    "ALIGN, BatchNorm": A(
        "AlignModel",
        {"text_config": TEXT, "projection_dim": 16, "vision_config": EFFICIENT},
        of(input_ids=ids(8), pixel_values=reals(3, 32, 32)),
        collate=with_loss,
        checks_predictions=False,
    ),
    "GroupViT, Gumbel noise": A(
        "GroupViTModel",
        {
            "text_config": CLIP_TEXT,
            "projection_dim": 8,
            "projection_intermediate_dim": 16,
            "vision_config": {**IMAGE, "depths": [1, 1], "num_group_tokens": [4, 0], "num_output_groups": [4, 4]},
        },
        paired,
        collate=with_loss,
        checks_predictions=False,
    ),
    "BLIP, captions": A(
        "BlipForConditionalGeneration",
        {
            "text_config": {**TEXT, "encoder_hidden_size": 16, "projection_dim": 8, "is_decoder": True},
            "vision_config": {**IMAGE, "projection_dim": 8},
            "projection_dim": 8,
        },
        of(pixel_values=reals(3, 16, 16), input_ids=ids(6), labels=ids(6)),
        checks_predictions=False,
    ),
    "ViT to GPT-2": A(
        "VisionEncoderDecoderModel",
        {
            "encoder": {"model_type": "vit", **IMAGE},
            "decoder": {
                "model_type": "gpt2",
                "vocab_size": VOCABULARY,
                "n_embd": 16,
                "n_layer": 2,
                "n_head": 2,
                "n_positions": 16,
                "add_cross_attention": True,
                "is_decoder": True,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
        captioned,
        **GENERATES,
    ),
    "ViLT": A(
        "ViltForQuestionAnswering",
        {
            **TEXT,
            "image_size": 16,
            "patch_size": 4,
            "max_image_length": 8,
            "num_labels": CLASSES,
            "hidden_dropout_prob": 0.1,
        },
        of(input_ids=ids(8), pixel_values=reals(3, 16, 16), labels=positive(CLASSES)),
    ),
    "LLaVA": A(
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **DECODER},
            "vision_config": {"model_type": "clip_vision_model", **IMAGE},
            "image_token_index": 1,
            "image_token_id": 1,
            "image_seq_length": 16,
            "vision_feature_layer": -1,
        },
        of(
            pixel_values=reals(3, 16, 16),
            input_ids=lambda g, i: torch.cat(
                [torch.ones(16, dtype=torch.long), torch.randint(3, 32, (6,), generator=g)]
            ),
            labels=lambda g, i: torch.cat([torch.full((16,), -100), torch.randint(3, 32, (6,), generator=g)]),
        ),
        checks_predictions=False,
    ),
    "LXMERT": A(
        "LxmertForQuestionAnswering",
        {
            **TEXT,
            "l_layers": 1,
            "x_layers": 1,
            "r_layers": 1,
            "visual_feat_dim": 8,
            "visual_pos_dim": 4,
            "num_qa_labels": CLASSES,
        },
        of(input_ids=ids(8), visual_feats=reals(3, 8), visual_pos=reals(3, 4), labels=number()),
    ),
    "CLAP, BatchNorm": A(
        "ClapModel",
        {
            "projection_dim": 8,
            "text_config": {**TEXT, "projection_dim": 8},
            "audio_config": {
                "spec_size": 64,
                "num_mel_bins": 8,
                "window_size": 2,
                "depths": [1, 1],
                "num_attention_heads": [1, 2],
                "patch_size": 4,
                "patch_stride": [4, 4],
                "patch_embeds_hidden_size": 8,
                "hidden_size": 16,
                "projection_dim": 8,
                "num_hidden_layers": 2,
                "enable_fusion": False,
                "num_classes": 4,
            },
        },
        of(input_ids=ids(8), input_features=reals(1, 60, 8)),
        collate=with_loss,
        checks_predictions=False,
    ),
}

SERIES = {
    "Time series transformer": A(
        "TimeSeriesTransformerForPrediction",
        {
            "prediction_length": 4,
            "context_length": 8,
            "lags_sequence": [1, 2],
            "num_time_features": 2,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "num_parallel_samples": 3,
        },
        of(
            past_values=positive(10),
            past_time_features=reals(10, 2),
            past_observed_mask=constant(torch.ones(10)),
            future_values=positive(4),
            future_time_features=reals(4, 2),
        ),
        arguments={"label_names": ["future_values"]},
        checks_predictions=False,
    ),
    "Informer, random keys": A(
        "InformerForPrediction",
        {
            "prediction_length": 4,
            "context_length": 8,
            "lags_sequence": [1, 2],
            "num_time_features": 2,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
            "sampling_factor": 1,
            "attention_type": "prob",
            "distil": True,
        },
        of(
            past_values=positive(10),
            past_time_features=reals(10, 2),
            past_observed_mask=constant(torch.ones(10)),
            future_values=positive(4),
            future_time_features=reals(4, 2),
        ),
        arguments={"label_names": ["future_values"]},
        checks_predictions=False,
    ),
    "Autoformer": A(
        "AutoformerForPrediction",
        {
            "prediction_length": 4,
            "context_length": 8,
            "label_length": 4,
            "lags_sequence": [1, 2],
            "num_time_features": 2,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16,
        },
        of(
            past_values=positive(10),
            past_time_features=reals(10, 2),
            past_observed_mask=constant(torch.ones(10)),
            future_values=positive(4),
            future_time_features=reals(4, 2),
        ),
        arguments={"label_names": ["future_values"]},
        checks_predictions=False,
    ),
    "PatchTST, BatchNorm": A(
        "PatchTSTForPrediction",
        {
            "num_input_channels": 2,
            "context_length": 16,
            "patch_length": 4,
            "patch_stride": 4,
            "prediction_length": 4,
            "d_model": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 16,
            "norm_type": "batchnorm",
            "ff_dropout": 0.1,
        },
        of(past_values=reals(16, 2), future_values=reals(4, 2)),
        arguments={"label_names": ["future_values"]},
        checks_predictions=False,
    ),
    "PatchTST, random masks": A(
        "PatchTSTForPretraining",
        {
            "num_input_channels": 2,
            "context_length": 16,
            "patch_length": 4,
            "patch_stride": 4,
            "d_model": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 16,
            "random_mask_ratio": 0.5,
        },
        of(past_values=reals(16, 2)),
        checks_predictions=False,
    ),
    "PatchTSMixer": A(
        "PatchTSMixerForPrediction",
        {
            "num_input_channels": 2,
            "context_length": 16,
            "patch_length": 4,
            "patch_stride": 4,
            "prediction_length": 4,
            "d_model": 8,
            "num_layers": 2,
            "norm_mlp": "BatchNorm",
            "dropout": 0.1,
        },
        of(past_values=reals(16, 2), future_values=reals(4, 2)),
        arguments={"label_names": ["future_values"]},
        checks_predictions=False,
    ),
}
REFORMER = A(
    "ReformerModelWithLMHead",
    {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "attention_head_size": 8,
        "num_attention_heads": 2,
        "feed_forward_size": 32,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [8, 8],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "num_hashes": 2,
        "is_decoder": True,
        "hash_seed": None,
        "lsh_attention_probs_dropout_prob": 0.1,
        "local_attention_probs_dropout_prob": 0.1,
        "hidden_dropout_prob": 0.1,
        "use_cache": False,
    },
    of(input_ids=ids(16), labels=ids(16)),
)
del A

ZOO: dict[str, Architecture] = {**ENCODERS, **DECODERS, **SEQUENCES, **PICTURES, **SOUNDS, **TOGETHER, **SERIES}
