"""What the rows of the zoo are made of: their type, data, collators, parts of configurations."""

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
    """

    model: str
    config: dict[str, Any]
    data: Callable[[], Examples]
    collate: Callable[[Examples], dict[str, Any]] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    trainer: str = "Trainer"
    checks_predictions: bool = True

    @property
    def stock(self) -> type[Trainer]:
        return getattr(transformers, self.trainer)

    @property
    def model_class(self) -> type[transformers.PreTrainedModel]:
        return getattr(transformers, self.model)

    def build(self) -> torch.nn.Module:
        """The model, always with the same weights."""
        set_seed(0)
        model = self.model_class(self.model_class.config_class(**self.config))
        # Where a weight is exactly 0, 1e-30 is not lost to rounding, and a ReLU has its kink.
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.01)
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


def masks(features: Examples) -> dict[str, Any]:
    """Masks and their classes are lists, with one tensor for each image."""
    return {
        "pixel_values": torch.stack([feature["pixel_values"] for feature in features]),
        "mask_labels": [feature["mask_labels"] for feature in features],
        "class_labels": [feature["class_labels"] for feature in features],
    }


def patches(features: Examples) -> dict[str, Any]:
    """The patches of all images of a batch are rows of one matrix, so that its length is no number of examples."""
    batch = default_data_collator(features)
    return {**batch, "pixel_values": batch["pixel_values"].flatten(0, 1)}


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
