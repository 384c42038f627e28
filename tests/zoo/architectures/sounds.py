"""Sound."""

from __future__ import annotations

import torch

from .parts import (
    CLASSES,
    SEQ2SEQ,
    SIZE,
    SPEECH,
    TEXT,
    Architecture,
    constant,
    ids,
    ignoring,
    number,
    of,
    reals,
    spoken,
    waves,
)

SOUNDS = {
    "wav2vec 2.0, CTC": Architecture(
        "Wav2Vec2ForCTC", {**SPEECH, "feat_extract_norm": "group", "layerdrop": 0.2, "pad_token_id": 0}, spoken
    ),
    "wav2vec 2.0, pre-training": Architecture(
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
    "wav2vec 2.0 conformer, BatchNorm": Architecture(
        "Wav2Vec2ConformerForCTC", {**SPEECH, "conv_depthwise_kernel_size": 5, "pad_token_id": 0}, spoken
    ),
    "HuBERT": Architecture("HubertForSequenceClassification", {**SPEECH, "conv_pos_batch_norm": True}, waves),
    "WavLM": Architecture(
        "WavLMForSequenceClassification",
        {**SPEECH, "num_buckets": 8, "max_bucket_distance": 16, "mask_feature_min_masks": 0},
        waves,
    ),
    "SEW": Architecture("SEWForSequenceClassification", {**SPEECH, "squeeze_factor": 2}, waves),
    "UniSpeech-SAT": Architecture("UniSpeechSatForSequenceClassification", SPEECH, waves),
    "AST": Architecture(
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
    "Whisper": Architecture(
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
    "Speech2Text": Architecture(
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
    "Speech encoder-decoder": Architecture(
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
    "SpeechT5": Architecture(
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
