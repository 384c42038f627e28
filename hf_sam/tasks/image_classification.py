"""Fine-tune an image classifier, or train one from scratch, with sharpness-aware minimization.

    hf-sam image-classification digits_sam --sam_rho 0.1

`--sam_rho 0` is the baseline with the same configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from transformers import (
    AutoModelForImageClassification,
    BaseImageProcessor,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from hf_sam import SAMTrainer

from .command_line.arguments import SAMArguments, parse_arguments
from .command_line.options import DataArguments, ModelArguments, RunArguments, option
from .data.images import AUGMENTATIONS, ImageDataset, ImageTransform, NewDrawEachEpoch, output_size, stream_images
from .data.labels import add_label_noise, check_classes, class_labels
from .data.loading import Splits, load_splits, make_splits, pick_column, public_name
from .data.summary import check_images, classes, sizes, tell
from .metrics import CLASSIFICATION, classification_metrics, hub_metrics
from .models import check_image_size, load_config, load_image_processor, load_model
from .running import check_training_arguments, classification_table, finish, prepare, recorded, save, train, write_card

METRICS = CLASSIFICATION  # of the test split


@dataclass
class ImageArguments:
    """Reading and augmentation of the images."""

    image_column: str | None = option(None, "Column of the images; default: detected.")
    image_size: int | None = option(None, "Side in pixels of the model's input; default: that of the processor.")
    check_images: str = option("sample", "Images to open before the first step: sample (of each split), all, none.")
    augmentation: str = option("none", f"Augmentation of the training images: {', '.join(AUGMENTATIONS)}.")

    def __post_init__(self):
        if self.check_images not in ("sample", "all", "none"):
            raise ValueError(f"check_images={self.check_images} is unknown. Allowed: sample, all, none.")
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation={self.augmentation} is unknown. Allowed: {', '.join(AUGMENTATIONS)}.")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} must be at least 1.")


ARGUMENTS = (ModelArguments, DataArguments, ImageArguments, RunArguments, SAMArguments, TrainingArguments)


def main(argv: Sequence[str] | None = None, callbacks: Sequence[TrainerCallback] = ()) -> SAMTrainer:
    """
    Train, evaluate and save.

    Args:
        argv (`Sequence[str]`, *optional*, defaults to `sys.argv[1:]`): The command line.
        callbacks (`Sequence[TrainerCallback]`, *optional*): Added to the trainer, besides those of the task.
    """
    model_args, data_args, image_args, run_args, sam_args, args = parse_arguments(ARGUMENTS, argv)
    sam_config = prepare(args, run_args, sam_args, model_args)

    with args.main_process_first(desc="reading the data"):
        splits, image_column, label_column, names = read_data(data_args, image_args)
    check_training_arguments(args, data_args, run_args, "validation" in splits, METRICS)
    opened = check_images(splits, image_column, image_args.check_images)
    if args.process_index == 0:
        tell([*sizes(splits), *classes(splits, label_column, names), *opened])

    config = load_config(model_args, labels=names, problem_type="single_label_classification")
    processor = load_image_processor(model_args, config, image_args.image_size)
    model = load_model(AutoModelForImageClassification, model_args, config)
    check_image_size(model, output_size(processor))

    images = prepare_images(splits, image_column, label_column, processor, data_args, image_args, args.seed)
    trainer = SAMTrainer(
        model=model,
        args=args,
        train_dataset=images["train"],
        eval_dataset=images.get("validation"),
        data_collator=default_data_collator,
        processing_class=processor,
        compute_metrics=partial(classification_metrics, hub=hub_metrics(run_args.hub_metrics)),
        callbacks=[*callbacks, *([] if data_args.streaming else [NewDrawEachEpoch(images["train"])])],
        sam_config=sam_config,
    )
    # The model's loss is a mean over examples that ignores `num_items_in_batch`. Without this, the Trainer would not
    # divide it under accumulation and would multiply it by the number of processes.
    trainer.model_accepts_loss_kwargs = False
    with recorded(trainer, splits, data_args, run_args, model=model_args, images=image_args) as record:
        train(trainer)
        finish(trainer, record, images, run_args, classification_table)
    save(trainer)
    write_card(trainer, dataset=[public_name(data_args)], tasks=["image-classification"])
    return trainer


def read_data(data_args: DataArguments, image_args: ImageArguments) -> tuple[Splits, str, str, list[str]]:
    """Read the splits, the columns of images and labels, and the names of the classes."""
    splits = load_splits(data_args)
    image_column = pick_column(splits, image_args.image_column, ("image", "img", "pixel_values"), "image_column")
    label_column = pick_column(
        splits, data_args.label_column, ("label", "labels", "fine_label", "class"), "label_column", taken=[image_column]
    )
    splits, names = class_labels(splits, label_column, data_args)
    splits = make_splits(splits, data_args, strata=label_column)
    check_classes(splits, label_column, names)
    return add_label_noise(splits, label_column, len(names), data_args), image_column, label_column, names


def prepare_images(
    splits: Splits,
    image_column: str,
    label_column: str,
    processor: BaseImageProcessor,
    data_args: DataArguments,
    image_args: ImageArguments,
    seed: int,
) -> dict:
    """Convert the splits to tensors: `train` with augmentation, `train_split` the same data without."""
    plain, augmented = ImageTransform(processor), ImageTransform(processor, image_args.augmentation)
    read = stream_images if data_args.streaming else ImageDataset
    images = {name: read(split, image_column, label_column, plain, name, seed) for name, split in splits.items()}
    images["train_split"] = images["train"]
    train_split = splits["train"]
    if data_args.streaming:
        train_split = train_split.shuffle(seed=seed, buffer_size=data_args.shuffle_buffer)
    images["train"] = read(train_split, image_column, label_column, augmented, "train", seed)
    return images
