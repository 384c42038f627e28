"""Two kinds of input."""

from __future__ import annotations

import torch

from .parts import (
    CLASSES,
    DECODER,
    EFFICIENT,
    GENERATES,
    IMAGE,
    TEXT,
    VOCABULARY,
    Architecture,
    captioned,
    ids,
    number,
    of,
    paired,
    positive,
    reals,
    with_loss,
)

CLIP_TEXT = {**TEXT, "projection_dim": 8}
TOGETHER = {
    "CLIP, contrastive": Architecture(
        "CLIPModel",
        {"text_config": CLIP_TEXT, "vision_config": {**IMAGE, "projection_dim": 8}, "projection_dim": 8},
        paired,
        collate=with_loss,
        checks_predictions=False,
    ),
    "SigLIP, contrastive": Architecture(
        "SiglipModel",
        {"text_config": TEXT, "vision_config": IMAGE},
        paired,
        collate=with_loss,
        checks_predictions=False,
    ),
    "ALIGN, BatchNorm": Architecture(
        "AlignModel",
        {"text_config": TEXT, "projection_dim": 16, "vision_config": EFFICIENT},
        of(input_ids=ids(8), pixel_values=reals(3, 32, 32)),
        collate=with_loss,
        checks_predictions=False,
    ),
    "GroupViT, Gumbel noise": Architecture(
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
    "BLIP, captions": Architecture(
        "BlipForConditionalGeneration",
        {
            "text_config": {**TEXT, "encoder_hidden_size": 16, "projection_dim": 8, "is_decoder": True},
            "vision_config": {**IMAGE, "projection_dim": 8},
            "projection_dim": 8,
        },
        of(pixel_values=reals(3, 16, 16), input_ids=ids(6), labels=ids(6)),
        checks_predictions=False,
    ),
    "ViT to GPT-2": Architecture(
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
    "ViLT": Architecture(
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
    "LLaVA": Architecture(
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
    "LXMERT": Architecture(
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
    "CLAP, BatchNorm": Architecture(
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
