"""Text in both directions."""

from __future__ import annotations

import torch

from .parts import (
    CLASSES,
    LENGTH,
    SIZE,
    TEXT,
    VOCABULARY,
    Architecture,
    choices,
    classified,
    ids,
    masked_at_random,
    number,
    of,
    replaced,
    spans,
    tagged,
    unmasked,
)

ENCODERS = {
    "BERT, masked words": Architecture("BertForMaskedLM", TEXT, unmasked, collate=masked_at_random),
    "BERT, multiple choice": Architecture("BertForMultipleChoice", TEXT, choices),
    "BERT, next sentence": Architecture(
        "BertForPreTraining", TEXT, of(input_ids=ids(8), labels=ids(8), next_sentence_label=number(2))
    ),
    "RoBERTa, questions": Architecture("RobertaForQuestionAnswering", TEXT, spans),
    "DistilBERT, tokens": Architecture(
        "DistilBertForTokenClassification",
        {"vocab_size": VOCABULARY, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "num_labels": CLASSES},
        tagged,
    ),
    "ELECTRA, replaced words": Architecture("ElectraForPreTraining", {**TEXT, "embedding_size": 8}, replaced),
    "ALBERT, shared layers": Architecture(
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
    "DeBERTa": Architecture(
        "DebertaForSequenceClassification",
        {**TEXT, "num_labels": CLASSES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        classified,
    ),
    "DeBERTa-v2": Architecture(
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
    "Longformer": Architecture(
        "LongformerForSequenceClassification",
        {**TEXT, "num_labels": CLASSES, "attention_window": 4},
        classified,
    ),
    "BigBird, random blocks": Architecture(
        "BigBirdForMaskedLM",
        {**TEXT, "attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 2},
        of(input_ids=ids(32)),
        collate=masked_at_random,
    ),
    "XLNet, questions": Architecture(
        "XLNetForQuestionAnsweringSimple",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
        spans,
    ),
    "XLM": Architecture(
        "XLMForSequenceClassification",
        {"vocab_size": VOCABULARY, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "num_labels": CLASSES},
        classified,
    ),
    "Funnel": Architecture(
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
    "MPNet": Architecture("MPNetForTokenClassification", {**TEXT, "num_labels": CLASSES}, tagged),
    "CANINE": Architecture(
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
    "FNet": Architecture("FNetForMaskedLM", TEXT, unmasked, collate=masked_at_random),
    "I-BERT, quantised": Architecture(
        "IBertForSequenceClassification", {**TEXT, "num_labels": CLASSES, "quant_mode": True}, classified
    ),
    "YOSO": Architecture(
        "YosoForSequenceClassification",
        {**TEXT, "num_labels": CLASSES, "use_expectation": True, "hash_code_len": 3},
        classified,
    ),
    "Nystromformer": Architecture(
        "NystromformerForMaskedLM",
        {**TEXT, "num_landmarks": 4, "segment_means_seq_len": LENGTH, "conv_kernel_size": 3},
        of(input_ids=ids(LENGTH)),
        collate=masked_at_random,
    ),
    "ConvBERT": Architecture(
        "ConvBertForSequenceClassification", {**TEXT, "embedding_size": 16, "num_labels": CLASSES}, classified
    ),
    "SqueezeBERT": Architecture(
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
    "ModernBERT": Architecture(
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
    "RemBERT": Architecture(
        "RemBertForMaskedLM",
        {**TEXT, "input_embedding_size": 8, "output_embedding_size": 8},
        unmasked,
        collate=masked_at_random,
    ),
    "MobileBERT": Architecture(
        "MobileBertForSequenceClassification",
        {**TEXT, "embedding_size": 8, "intra_bottleneck_size": 16, "true_hidden_size": 16, "num_labels": CLASSES},
        classified,
    ),
    "LayoutLM": Architecture(
        "LayoutLMForTokenClassification",
        {**TEXT, "max_2d_position_embeddings": 64, "num_labels": CLASSES},
        of(input_ids=ids(8), bbox=lambda g, i: torch.tensor([[1, 2, 9, 20]] * 8), labels=ids(8, low=0, high=CLASSES)),
    ),
    "Perceiver": Architecture(
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
REFORMER = Architecture(
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
