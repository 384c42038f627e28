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
    constant,
    ids,
    number,
    of,
    paired,
    patches,
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
    "Chinese CLIP": Architecture(
        "ChineseCLIPModel",
        {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 8},
        paired,
        collate=with_loss,
        checks_predictions=False,
    ),
    "CLIPSeg": Architecture(
        "CLIPSegForImageSegmentation",
        {
            "text_config": CLIP_TEXT,
            "vision_config": IMAGE,
            "projection_dim": 8,
            "extract_layers": [0, 1],
            "reduce_dim": 8,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16,
        },
        of(
            input_ids=ids(8),
            pixel_values=reals(3, 16, 16),
            labels=lambda g, i: (torch.rand(16, 16, generator=g) > 0.5).float(),
        ),
        checks_predictions=False,
    ),
    "OWL-ViT": Architecture(
        "OwlViTModel",
        {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 8},
        paired,
        collate=with_loss,
        checks_predictions=False,
    ),
    "Two encoders of one's own": Architecture(
        "VisionTextDualEncoderModel",
        {
            "text_config": {"model_type": "bert", **TEXT},
            "vision_config": {"model_type": "vit", **IMAGE},
            "projection_dim": 8,
        },
        paired,
        collate=with_loss,
        checks_predictions=False,
    ),
    "GIT": Architecture(
        "GitForCausalLM",
        {**TEXT, "vision_config": IMAGE},
        of(input_ids=ids(8), pixel_values=reals(3, 16, 16), labels=ids(8)),
        checks_predictions=False,
    ),
    "BLIP, questions": Architecture(
        "BlipForQuestionAnswering",
        {
            "text_config": {**TEXT, "encoder_hidden_size": 16, "projection_dim": 8},
            "vision_config": {**IMAGE, "projection_dim": 8},
            "projection_dim": 8,
        },
        of(pixel_values=reals(3, 16, 16), input_ids=ids(6), labels=ids(6)),
        checks_predictions=False,
    ),
    "Qwen2-VL": Architecture(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                **DECODER,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            },
            "vision_config": {
                "depth": 1,
                "embed_dim": 16,
                "hidden_size": 16,
                "num_heads": 2,
                "patch_size": 4,
                "mlp_ratio": 2,
            },
            "image_token_id": 3,
            "video_token_id": 4,
            "vision_start_token_id": 5,
            "vision_end_token_id": 6,
        },
        of(
            input_ids=lambda g, i: torch.cat(
                [torch.tensor([5, 3, 3, 3, 3, 6]), torch.randint(7, 32, (6,), generator=g)]
            ),
            mm_token_type_ids=constant(torch.tensor([0, 1, 1, 1, 1, 0] + [0] * 6)),
            pixel_values=reals(16, 96),
            image_grid_thw=constant(torch.tensor([1, 4, 4])),
            labels=lambda g, i: torch.cat([torch.full((6,), -100), torch.randint(7, 32, (6,), generator=g)]),
        ),
        collate=patches,
        checks_predictions=False,
    ),
    "Gemma 3, pictures": Architecture(
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**DECODER, "query_pre_attn_scalar": 8, "sliding_window": 4},
            "vision_config": {"model_type": "siglip_vision_model", **IMAGE, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": 3,
            "image_token_id": 3,
            "boi_token_index": 4,
            "eoi_token_index": 5,
        },
        of(
            input_ids=lambda g, i: torch.cat(
                [torch.tensor([4, 3, 3, 3, 3, 5]), torch.randint(6, 32, (6,), generator=g)]
            ),
            token_type_ids=constant(torch.tensor([0, 1, 1, 1, 1, 0] + [0] * 6)),
            pixel_values=reals(3, 16, 16),
            labels=lambda g, i: torch.cat([torch.full((6,), -100), torch.randint(6, 32, (6,), generator=g)]),
        ),
        checks_predictions=False,
    ),
}
