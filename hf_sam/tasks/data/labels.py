"""What the labels are: classes with names, sets of classes, or numbers; and what is done to those for training."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, Value

from ..command_line.errors import UserError
from ..command_line.options import DataArguments
from .loading import Splits, column, replace_column
from .sampling import symmetric_noise
from .summary import rows_in_words

MAX_CLASSES_FOUND = 1000


def class_labels(splits: Splits, name: str, args: DataArguments) -> tuple[Splits, list[str]]:
    """
    Make the label column of every split class numbers, and say what the classes are called.

    Args:
        splits (`dict`): The splits; a streamed one must name its classes itself or by `class_names`.
        name (`str`): The label column.
        args (`DataArguments`): Reads `class_names`.

    Returns:
        The splits with labels 0, 1, ..., and the names in that order.

    Raises:
        UserError: Labels that are no classes, that are missing, or that the training split does not have.
    """
    feature = splits["train"].features[name] if splits["train"].features else None
    if args.class_names and isinstance(feature, ClassLabel) and len(args.class_names) != feature.num_classes:
        raise UserError(f"class_names has {len(args.class_names)} names, but {name} has {feature.num_classes} classes.")
    if isinstance(feature, ClassLabel):
        names = args.class_names or list(feature.names)
    elif args.streaming:
        if not args.class_names:
            raise UserError(f"A stream does not say which classes {name} has: give --class_names, in order.")
        names = args.class_names
        number = {text: index for index, text in enumerate(names)}
        return {
            split: stream.map(lambda row: {name: _number(row[name], number, name, names)})
            for split, stream in splits.items()
        }, names
    else:
        names = args.class_names or _names_found(splits["train"], name)
        splits = {split: _encode(dataset, name, names, split) for split, dataset in splits.items()}
    return splits, names


def check_classes(splits: Splits, name: str, names: list[str], args: DataArguments | None = None) -> None:
    """
    Every class has training examples, and every example has a class. `args` are those that the splits were made by.

    Raises:
        UserError: Otherwise; the message names the classes or the split.
    """
    for split, dataset in splits.items():
        if not isinstance(dataset, Dataset):
            continue
        values = column(dataset, name)
        if any(value is None for value in values) or values.min() < 0 or values.max() >= len(names):
            raise UserError(
                f"The {split} split has examples without a class in {name} (empty, or outside 0 to {len(names) - 1}); "
                f"choose a split with labels by {split}_split."
            )
        missing = [names[index] for index in range(len(names)) if index not in set(values.tolist())]
        if missing and split == "train":
            keep = "leave the class out of the data"
            if args is not None and args.train_samples:
                each = max(1, args.train_samples // len(names))
                keep = (
                    f"train_samples={args.train_samples} of {len(names)} classes, drawn in their own proportions, leaves none "
                    f"of it: give more, or --train_samples_per_class {each} for as many of every class"
                )
            raise UserError(f"The train split has no example of class {', '.join(missing[:10])} of {name}: {keep}.")
    if len(names) < 2:
        raise UserError(f"{name} has only the class {names[0]}; a classifier needs at least two.")


def add_label_noise(splits: Splits, name: str, num_classes: int, args: DataArguments) -> Splits:
    """Symmetric noise on the training labels only; the true ones are kept in the column `clean_<name>`."""
    if not args.label_noise:
        return splits
    train = splits["train"]
    clean = column(train, name)
    noisy, _ = symmetric_noise(clean, num_classes, args.label_noise, args.noise_seed)
    feature = train.features[name]
    train = train.rename_column(name, f"clean_{name}").add_column(name, noisy.tolist(), feature=feature)
    return {**splits, "train": train}


def _names_found(train: Dataset, name: str) -> list[str]:
    values = column(train, name)
    if any(value is None for value in values):
        empty = [row for row, value in enumerate(values) if value is None]
        raise UserError(
            f"The train split has {len(empty)} empty values in {name}: {rows_in_words(empty)}. Remove these rows, or fill "
            f"in their labels."
        )
    if values.ndim != 1 or values.dtype.kind not in "iubUO":
        raise UserError(
            f"{name} holds {train.features[name]}, which is no class: a class is a whole number or a word. "
            f"Name another column by label_column."
        )
    found = np.unique(values)
    if len(found) > min(MAX_CLASSES_FOUND, max(20, len(values) // 2)):
        raise UserError(
            f"{name} holds {len(found)} different values in {len(values)} training examples, too many to be classes. "
            f"Name another column by label_column, or the classes by class_names."
        )
    return [str(value) for value in found]


def _encode(dataset: Dataset, name: str, names: list[str], split: str) -> Dataset:
    number = {text: index for index, text in enumerate(names)}
    values = [_number(value, number, name, names, split) for value in column(dataset, name).tolist()]
    return replace_column(dataset, name, values, ClassLabel(names=names))


def _number(value, number: dict[str, int], name: str, names: list[str], split: str = "streamed") -> int:
    if str(value) not in number:
        raise UserError(
            f"The {split} split has {value!r} in {name}, which is none of the classes "
            f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''} of the train split."
        )
    return number[str(value)]


def multi_hot_labels(splits: Splits, name: str, args: DataArguments) -> tuple[Splits, list[str]]:
    """
    Make a column of label lists (or of words with commas between) one of 0.0 / 1.0 vectors.

    Raises:
        UserError: A label that the training split does not have.
    """
    inner = getattr(splits["train"].features[name], "feature", None)
    rows = {split: [_label_list(value) for value in column_of_lists(data, name)] for split, data in splits.items()}
    if isinstance(inner, ClassLabel):
        names = list(inner.names)
        rows = {split: [[names[int(v)] for v in row] for row in values] for split, values in rows.items()}
    else:
        names = args.class_names or sorted({label for row in rows["train"] for label in row})
    number = {text: index for index, text in enumerate(names)}
    encoded = {}
    for split, dataset in splits.items():
        hot = np.zeros((len(dataset), len(names)), dtype=np.float32)
        for index, row in enumerate(rows[split]):
            hot[index, [_number(label, number, name, names, split) for label in row]] = 1.0
        encoded[split] = replace_column(dataset, name, hot.tolist())
    return encoded, names


def numeric_labels(splits: Splits, name: str) -> Splits:
    """
    Make the label column numbers for regression.

    Raises:
        UserError: A value that is no finite number.
    """
    encoded = {}
    for split, dataset in splits.items():
        try:
            values = column(dataset, name).astype(np.float32)
        except (TypeError, ValueError):
            raise UserError(
                f"The {split} split has values in {name} that are no numbers, as regression needs."
            ) from None
        if not np.isfinite(values).all():
            bad = np.flatnonzero(~np.isfinite(values)).tolist()
            raise UserError(
                f"The {split} split has {len(bad)} empty or infinite values in {name}: {rows_in_words(bad)}. Remove these "
                f"rows, or fill in their labels."
            )
        encoded[split] = replace_column(dataset, name, values.tolist(), Value("float32"))
    return encoded


def column_of_lists(dataset: Dataset, name: str) -> list:
    """All values of a column whose values are lists of any length, or texts."""
    return dataset.select_columns([name]).with_format("arrow")[:][name].to_pylist()


def _label_list(value) -> list[str]:
    items = value.split(",") if isinstance(value, str) else value or []
    return [str(item).strip() for item in items if str(item).strip()]
