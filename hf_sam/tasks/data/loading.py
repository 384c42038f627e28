"""Load train, validation and test splits from a name, with readable errors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from ...suggestions import did_you_mean
from ..command_line.errors import UserError, instead_of, one_line
from ..command_line.options import DataArguments
from .sampling import stratified_sample, stratified_split, total_for_every_class
from .tabular import find_dialect, header

BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
SHARD = re.compile(r"(?P<split>\w+)-\d{5}(-of-\d{5})?")  # file names as on the hub: validation_matched-00000-of-00001
Split = Dataset | IterableDataset
Splits = dict[str, Split]


def load_splits(args: DataArguments) -> Splits:
    """
    Load the splits `"train"`, `"test"` and, if requested, `"validation"`, without looking at labels.

    If the source has no test split and is not streamed, `make_splits` splits one off later, by class.

    Raises:
        UserError: If the source cannot be read, or has no split of that name.
    """
    found = _load(args)
    if isinstance(found, (Dataset, IterableDataset)):
        found = {args.train_split: found}
    splits = {"train": _named(found, args.train_split, "train_split")}
    if args.validation_split:
        splits["validation"] = _named(found, args.validation_split, "validation_split")
    test = args.test_split or next((name for name in ("test", "validation") if name in found), None)
    if test and test not in (args.train_split, args.validation_split):
        splits["test"] = _named(found, test, "test_split")
    elif args.test_split:
        raise UserError(f"test_split={test} is the same split as train_split or validation_split; name another one.")
    elif args.streaming:
        raise UserError("Streaming cannot split off a test split: name an existing split with --test_split.")
    for name, split in splits.items():
        if isinstance(split, Dataset) and len(split) == 0:
            raise UserError(f"The {name} split of {args.dataset} is empty.")
    return splits


def make_splits(splits: Splits, args: DataArguments, strata: str | None) -> Splits:
    """
    Split off missing splits and draw the requested subsets, both stratified by the column `strata`. Each uses a seed of
    its own, so that neither depends on the training seed.

    Raises:
        UserError: If the data are too few for a requested fraction or count.
    """
    if args.streaming:
        return splits
    splits = dict(splits)
    if "test" not in splits:
        splits["train"], splits["test"] = _split(splits["train"], args.test_size, args.split_seed, strata)
    if args.validation_size:
        splits["train"], splits["validation"] = _split(splits["train"], args.validation_size, args.split_seed, strata)
    train = splits["train"]
    if args.train_samples or args.train_samples_per_class:
        classes = column(train, strata) if strata else np.zeros(len(train), dtype=int)
        kept = stratified_sample(classes, args.train_samples, args.train_samples_per_class, args.subset_seed)
        if strata:
            _check_every_class(train, strata, classes, classes[kept], args)
        splits["train"] = train.select(kept)
    for name, count in (("validation", args.validation_samples), ("test", args.test_samples)):
        if count and name in splits:
            classes = column(splits[name], strata) if strata else np.zeros(len(splits[name]), dtype=int)
            splits[name] = splits[name].select(stratified_sample(classes, count, None, args.split_seed))
    return splits


def _check_every_class(train: Dataset, strata: str, classes: np.ndarray, kept: np.ndarray, args: DataArguments) -> None:
    """
    Raises:
        UserError: If a sample drawn in the proportions of the classes has no example of one; names a sample that has.
    """
    lost = np.setdiff1d(classes, kept)
    if not len(lost):
        return
    names = getattr(train.features[strata], "names", None)
    listed = ", ".join(str(names[index] if names else index) for index in lost[:10].tolist())
    smallest = int(np.unique(classes, return_counts=True)[1].min())
    each = max(1, min(smallest, args.train_samples // len(np.unique(classes))))
    raise UserError(
        f"train_samples={args.train_samples}, drawn in the proportions of the classes, has no example of {listed} in "
        f"{strata}; give at least --train_samples {total_for_every_class(classes)}, or --train_samples_per_class {each} "
        f"for equally many of each class."
    )


def column(dataset: Dataset, name: str) -> np.ndarray:
    """Return all values of one column, `(len(dataset),)`."""
    return np.asarray(dataset.select_columns([name]).with_format("arrow")[:][name].to_pylist())


def replace_column(dataset: Dataset, name: str, values: list, feature: Any = None) -> Dataset:
    """Return the data set with new values, possibly of another type, in one column."""
    old = f"replaced {name}"
    return dataset.rename_column(name, old).add_column(name, values, feature=feature).remove_columns(old)


def pick_column(
    splits: Splits, given: str | None, candidates: Sequence[str], argument: str, taken: Sequence[str] = ()
) -> str:
    """
    Return the column the user named, otherwise the first of `candidates` that exists.

    Raises:
        UserError: If it does not exist in every split; the message lists the columns that do.
    """
    names = column_names(splits["train"])
    name = given or next((name for name in candidates if name in names and name not in taken), None)
    if name is None:
        raise UserError(f"No column found for {argument}. The data set has: {', '.join(names)}. Give --{argument}.")
    for split, dataset in splits.items():
        if name not in column_names(dataset):
            there = column_names(dataset)
            raise UserError(
                f"{argument}={name} is not a column of the {split} split, which has: {', '.join(there)}."
                f"{did_you_mean(name, there)}"
            )
    return name


def column_names(dataset: Split) -> list[str]:
    """Return the columns; for a streamed data set without features, those of its first row."""
    return list(dataset.column_names or next(iter(dataset)))


def public_name(args: DataArguments) -> str:
    """Return the name of the data for a model card: the hub id, or the name of a local file or folder without its path."""
    path = Path(args.dataset).expanduser()
    return path.name if path.exists() else args.dataset


# --- reading -------------------------------------------------------------------------------------------------------


def _load(args: DataArguments) -> DatasetDict | IterableDatasetDict | Split:
    if args.dataset is None:
        raise UserError("Give --dataset: a hub id, a local file or folder, or digits.")
    if args.dataset == "digits":
        return digits()
    path = Path(args.dataset).expanduser()
    if path.exists():
        return _load_local(path, args)
    looks_local = path.suffix in BUILDERS or args.dataset.startswith((".", "/", "~")) or args.dataset.count("/") > 1
    if looks_local:
        raise UserError(f"dataset={args.dataset} does not exist.{_neighbours(path)}")
    try:
        return datasets.load_dataset(
            args.dataset, args.dataset_config, revision=args.dataset_revision, streaming=args.streaming
        )
    except (ConnectionError, OSError) as error:
        raise UserError(
            f"dataset={args.dataset} is not a local file or folder and cannot be loaded from the hub "
            f"(is this machine offline?): {one_line(error)}"
        ) from error
    except (ValueError, RuntimeError) as error:
        raise UserError(f"dataset={args.dataset}: {one_line(error)}") from error


def _load_local(path: Path, args: DataArguments) -> DatasetDict | IterableDatasetDict | Split:
    source = _file_source(path, args.train_split) if path.is_file() else _folder_source(path)
    source |= _dialect(source, path, args)
    try:
        return datasets.load_dataset(**source, streaming=args.streaming)
    except Exception as error:  # the readers used by `datasets` raise all kinds of errors, all about this file
        cause = error.__cause__ or error
        hint = f" Leave out --csv_delimiter {args.csv_delimiter!r} to have it detected." if args.csv_delimiter else ""
        raise UserError(f"dataset={path} cannot be read: {one_line(cause).removesuffix('.')}.{hint}") from error


def _file_source(path: Path, split: str) -> dict[str, Any]:
    """Return the arguments of `datasets.load_dataset` for reading one file as one split."""
    suffix = path.suffix.lower()
    if suffix not in BUILDERS:
        raise UserError(f"dataset={path} has an unknown suffix. Allowed: {', '.join(BUILDERS)}, or a folder.")
    if path.stat().st_size == 0:
        raise UserError(f"dataset={path} is empty.")
    _check_text_file(path)
    return {"path": BUILDERS[suffix], "data_files": {split: str(path)}}


def _dialect(source: dict[str, Any], path: Path, args: DataArguments) -> dict[str, str]:
    """Return encoding and delimiter for the csv reader; all files of a folder are assumed to be like the first."""
    if source["path"] != "csv":
        return {}
    files = sorted(file for file in path.rglob("*.[ct]sv") if file.stat().st_size) if path.is_dir() else [path]
    dialect = find_dialect(files[0], args.csv_encoding, args.csv_delimiter)
    names = header(files[0], dialect)
    if len(set(names)) < len(names):
        raise UserError(
            f"dataset={files[0]} has two columns of the same name in its first line: {', '.join(names)}; rename one."
        )
    told = dialect.describe(files[0])
    if told and int(os.environ.get("LOCAL_RANK", "0")) <= 0:
        print(f"data: {told}", flush=True)
    return {"delimiter": dialect.delimiter, "encoding": dialect.encoding}


def _folder_source(path: Path) -> dict[str, Any]:
    """Return the arguments of `datasets.load_dataset` for a folder of images by class, or of files by split."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    if any(file.suffix.lower() in IMAGE_SUFFIXES for file in files):
        return {"path": "imagefolder", "data_dir": str(path)}
    tables = [file for file in files if file.suffix.lower() in BUILDERS]
    kinds = {BUILDERS[file.suffix.lower()] for file in tables}
    if not kinds:
        raise UserError(f"dataset={path} contains no images and no csv, json or parquet files.")
    if len(kinds) > 1:
        raise UserError(f"dataset={path} contains files of several kinds ({', '.join(sorted(kinds))}); name one file.")
    names = [SHARD.fullmatch(file.stem) for file in tables]
    if not all(names):
        return {"path": kinds.pop(), "data_dir": str(path)}
    shards: dict[str, list[str]] = {}
    for name, file in zip(names, tables, strict=True):
        shards.setdefault(name["split"], []).append(str(file))
    return {"path": kinds.pop(), "data_files": shards}


def _check_text_file(path: Path) -> None:
    """Check a JSON file, because the readers report broken files at length."""
    if BUILDERS[path.suffix.lower()] == "json":
        try:
            with path.open(encoding="utf-8") as file:
                while file.read(2**20):
                    pass
        except UnicodeDecodeError:
            raise UserError(f"dataset={path} is not in UTF-8, as JSON must be; save it as UTF-8.") from None
    if path.suffix.lower() == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            first = path.read_text(encoding="utf-8").lstrip().splitlines()[:1]
            if not first or not _is_json(first[0]):  # one object per line is fine
                raise UserError(f"dataset={path} is not valid JSON: {error}.") from None


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _neighbours(path: Path) -> str:
    """Suggest what a folder contains instead of `path`: the nearest name, otherwise the first ones."""
    names = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    return instead_of(path, names)


def _named(found: dict[str, Split], name: str, argument: str) -> Split:
    if name not in found:
        raise UserError(f"{argument}={name} does not exist. The data set has: {', '.join(found)}.")
    return found[name]


def _split(dataset: Dataset, share: float, seed: int, strata: str | None) -> tuple[Dataset, Dataset]:
    classes = column(dataset, strata) if strata else np.zeros(len(dataset), dtype=int)
    kept, held_out = stratified_split(classes, share, seed)
    return dataset.select(kept), dataset.select(held_out)


def digits() -> Dataset:
    """The 1,797 handwritten digits, 8 x 8, that come with scikit-learn: `image`, `label`."""
    from PIL import Image
    from sklearn.datasets import load_digits

    source = load_digits()
    images = [Image.fromarray(pixels) for pixels in np.round(source.images * 255 / 16).astype("uint8")]
    names = [str(digit) for digit in source.target_names]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return Dataset.from_dict({"image": images, "label": source.target.tolist()}, features=features)
