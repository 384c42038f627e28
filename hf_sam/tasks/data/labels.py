"""Labels: classes with names, sets of classes, or numbers; and label noise."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, Value

from ..command_line.errors import UserError
from ..command_line.options import DataArguments
from .loading import Splits, column, replace_column
from .sampling import symmetric_noise
from .summary import how_many, rows_in_words

MAX_CLASSES_FOUND = 1000


def class_labels(splits: Splits, name: str, args: DataArguments) -> tuple[Splits, list[str]]:
    """
    Convert the label column of every split to class indices, and return the names of the classes.

    Args:
        splits (`dict`): The splits; a streamed one needs class names in its features or in `class_names`.
        name (`str`): The label column.
        args (`DataArguments`): `class_names` is used.

    Returns:
        The splits with labels 0, 1, ..., and the names in that order.

    Raises:
        UserError: If labels are not classes, are missing, or do not occur in the training split.
    """
    feature = splits["train"].features[name] if splits["train"].features else None
    if args.class_names and isinstance(feature, ClassLabel) and len(args.class_names) != feature.num_classes:
        raise UserError(
            f"class_names has {len(args.class_names)} names, but {name} has {feature.num_classes} classes; give one for each."
        )
    if isinstance(feature, ClassLabel):
        names = args.class_names or list(feature.names)
    elif args.streaming:
        if not args.class_names:
            raise UserError(f"The classes of {name} are unknown when streaming: give --class_names, in order.")
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


def check_classes(splits: Splits, name: str, names: list[str]) -> None:
    """
    Check that every class has training examples and every example has a class.

    Raises:
        UserError: If not; the message names the classes or the split.
    """
    for split, dataset in splits.items():
        if not isinstance(dataset, Dataset):
            continue
        values = column(dataset, name)
        if any(value is None for value in values) or values.min() < 0 or values.max() >= len(names):
            raise UserError(
                f"The {split} split has examples without a class in {name} (empty, or outside 0 to {len(names) - 1}); "
                f"choose a split with labels with --{split}_split."
            )
        missing = [names[index] for index in range(len(names)) if index not in set(values.tolist())]
        if missing and split == "train":
            raise UserError(
                f"The train split has no example of class {', '.join(missing[:10])} in {name}; remove the class from the data."
            )
    if len(names) < 2:
        raise UserError(f"{name} has only the class {names[0]}; a classifier needs at least two.")


def add_label_noise(splits: Splits, name: str, num_classes: int, args: DataArguments) -> Splits:
    """Add symmetric noise to the training labels only; the true ones are kept in the column `clean_<name>`."""
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
            f"The train split has {how_many(empty, 'empty value')} in {name}: {rows_in_words(empty)}. Remove these rows, or fill "
            f"in their labels."
        )
    if values.ndim != 1 or values.dtype.kind not in "iubUO":
        raise UserError(
            f"{name} contains {train.features[name]}, not classes: a class is a whole number or a word. "
            f"Name another column with --label_column."
        )
    found = np.unique(values)
    if len(found) > min(MAX_CLASSES_FOUND, max(20, len(values) // 2)):
        raise UserError(
            f"{name} has {len(found)} different values in {len(values)} training examples, too many to be classes. "
            f"Name another column with --label_column, or give the classes with --class_names."
        )
    return [str(value) for value in found]


def _encode(dataset: Dataset, name: str, names: list[str], split: str) -> Dataset:
    number = {text: index for index, text in enumerate(names)}
    values = [_number(value, number, name, names, split) for value in column(dataset, name).tolist()]
    return replace_column(dataset, name, values, ClassLabel(names=names))


def _number(value, number: dict[str, int], name: str, names: list[str], split: str = "streamed") -> int:
    if str(value) not in number:
        raise UserError(
            f"The {split} split has {value!r} in {name}, which is not one of the classes "
            f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''} of the train split."
        )
    return number[str(value)]


def multi_hot_labels(splits: Splits, name: str, args: DataArguments) -> tuple[Splits, list[str]]:
    """
    Convert a column of label lists (or of comma-separated words) to vectors of 0.0 and 1.0; such vectors stay as they are.

    Raises:
        UserError: If a label does not occur in the training split, or vectors differ in length.
    """
    inner = getattr(splits["train"].features[name], "feature", None)
    if not isinstance(inner, ClassLabel) and is_multi_hot(column_of_lists(splits["train"], name)):
        return _checked_vectors(splits, name, args)
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


def is_multi_hot(rows: list) -> bool:
    """Whether each row has a 0 or 1 per label: rows of one length, some with a repetition, which a list of labels lacks."""
    if not all(isinstance(row, list) and all(value in (0, 1) for value in row) for row in rows):
        return False
    return len({len(row) for row in rows}) == 1 and any(len(set(row)) < len(row) for row in rows)


def _checked_vectors(splits: Splits, name: str, args: DataArguments) -> tuple[Splits, list[str]]:
    width = len(column_of_lists(splits["train"], name)[0])
    names = args.class_names or [f"LABEL_{index}" for index in range(width)]
    if len(names) != width:
        raise UserError(
            f"class_names has {len(names)} names, but {name} has {width} values per example; give one for each."
        )
    encoded = {}
    for split, dataset in splits.items():
        rows = column_of_lists(dataset, name)
        bad = [index for index, row in enumerate(rows) if len(row or []) != width or not set(row) <= {0, 1}]
        if bad:
            raise UserError(
                f"The {split} split has {how_many(bad, 'example')} without {width} values of 0 or 1 in {name}: "
                f"{rows_in_words(bad)}. Correct or remove these rows."
            )
        encoded[split] = replace_column(dataset, name, np.array(rows, dtype=np.float32).tolist())
    return encoded, names


def numeric_labels(splits: Splits, name: str) -> Splits:
    """
    Convert the label column to numbers for regression.

    Raises:
        UserError: If a value is not a finite number.
    """
    encoded = {}
    for split, dataset in splits.items():
        try:
            values = column(dataset, name).astype(np.float32)
        except (TypeError, ValueError):
            raise UserError(
                f"The {split} split has values in {name} that are not numbers, which regression needs."
            ) from None
        if not np.isfinite(values).all():
            bad = np.flatnonzero(~np.isfinite(values)).tolist()
            raise UserError(
                f"The {split} split has {how_many(bad, 'empty or infinite value')} in {name}: {rows_in_words(bad)}. Remove these "
                f"rows, or fill in their labels."
            )
        encoded[split] = replace_column(dataset, name, values.tolist(), Value("float32"))
    return encoded


def column_of_lists(dataset: Dataset, name: str) -> list:
    """Return all values of a column of lists of any length, or of texts."""
    return dataset.select_columns([name]).with_format("arrow")[:][name].to_pylist()


def _label_list(value) -> list[str]:
    items = value.split(",") if isinstance(value, str) else value or []
    return [str(item).strip() for item in items if str(item).strip()]
