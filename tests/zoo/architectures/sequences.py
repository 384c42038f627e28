"""Sequence to sequence, evaluated by generating."""

from __future__ import annotations

import torch

from .parts import CLASSES, GENERATES, SEQ2SEQ, T5, TEXT, VOCABULARY, Architecture, number, of, translated

SEQUENCES = {
    "T5, generating": Architecture("T5ForConditionalGeneration", T5, translated, **GENERATES),
    "BART, generating": Architecture("BartForConditionalGeneration", SEQ2SEQ, translated, **GENERATES),
    "BART, layers left out": Architecture(
        "BartForConditionalGeneration",
        {**SEQ2SEQ, "encoder_layerdrop": 0.3, "decoder_layerdrop": 0.3},
        translated,
        trainer="Seq2SeqTrainer",
    ),
    "BART, classifying": Architecture(
        "BartForSequenceClassification",
        {**SEQ2SEQ, "num_labels": CLASSES},
        of(
            input_ids=lambda g, i: torch.cat([torch.randint(3, 32, (7,), generator=g), torch.tensor([2])]),
            labels=number(),
        ),
    ),
    "Pegasus": Architecture("PegasusForConditionalGeneration", SEQ2SEQ, translated, **GENERATES),
    "Marian": Architecture("MarianMTModel", SEQ2SEQ, translated, **GENERATES),
    "M2M100": Architecture("M2M100ForConditionalGeneration", SEQ2SEQ, translated, **GENERATES),
    "LED": Architecture(
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
    "LongT5": Architecture(
        "LongT5ForConditionalGeneration",
        {**T5, "local_radius": 2, "global_block_size": 4, "encoder_attention_type": "transient-global"},
        translated,
        **GENERATES,
    ),
    "Switch Transformer": Architecture(
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
    "NLLB-MoE": Architecture(
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
    "ProphetNet": Architecture(
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
    "Encoder-decoder of BERTs": Architecture(
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
