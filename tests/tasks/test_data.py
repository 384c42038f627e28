"""Where data come from, which columns they have, and what is done to the training labels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import stand_ins
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value

from hf_sam.tasks.command_line.errors import UserError
from hf_sam.tasks.command_line.options import DataArguments
from hf_sam.tasks.data.labels import add_label_noise, check_classes, class_labels, multi_hot_labels, numeric_labels
from hf_sam.tasks.data.loading import column, digits, load_splits, make_splits, pick_column
from hf_sam.tasks.data.summary import classes, look_alikes, truncation
from hf_sam.tasks.data.texts import check_labelled

ROWS = [{"text": f"text {i}", "label": ["no", "yes"][i % 2]} for i in range(20)]


def prepared(splits, label="label", **kwargs):
    args = DataArguments(**kwargs)
    splits, names = class_labels(splits, label, args)
    splits = make_splits(splits, args, strata=label)
    check_classes(splits, label, names)
    return add_label_noise(splits, label, len(names), args), names


def write(path):
    if path.suffix == ".csv":
        path.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS))
    elif path.suffix == ".tsv":
        path.write_text("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in ROWS))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    else:
        Dataset.from_list(ROWS).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_local_file_gets_a_test_split_of_its_own(suffix, tmp_path):
    splits, names = prepared(load_splits(DataArguments(dataset=write(tmp_path / f"a.{suffix}"))))
    assert names == ["no", "yes"]
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "test": 4}
    assert sorted(splits["test"]["label"]) == [0, 0, 1, 1]
    assert not set(splits["train"]["text"]) & set(splits["test"]["text"])


def test_a_folder_of_images(tmp_path):
    for split in ("train", "test"):
        for i in range(4):
            folder = tmp_path / split / ["cat", "dog"][i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            stand_ins.image(i).save(folder / f"{i}.png")
    splits, names = prepared(load_splits(DataArguments(dataset=str(tmp_path))))
    assert names == ["cat", "dog"]
    assert {name: len(split) for name, split in splits.items()} == {"train": 4, "test": 4}


def test_a_folder_of_shards_has_the_splits_that_its_files_name(tmp_path):
    for split in ("train", "validation_matched", "validation_mismatched"):
        for shard in range(2):
            Dataset.from_list(ROWS[:4]).to_parquet(tmp_path / f"{split}-0000{shard}-of-00002.parquet")
    splits = load_splits(DataArguments(dataset=str(tmp_path), test_split="validation_mismatched"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 8, "test": 8}


def test_digits():
    splits, names = prepared({"train": digits()}, train_samples=500)
    assert names == list("0123456789")
    assert {name: len(split) for name, split in splits.items()} == {"train": 500, "test": 450}
    assert np.bincount(column(splits["train"], "label")).min() >= 48


def test_splits_do_not_move_with_what_is_kept():
    whole, _ = prepared({"train": digits()})
    part, _ = prepared({"train": digits()}, train_samples=100, validation_size=0.1, subset_seed=3)
    assert whole["test"]["label"] == part["test"]["label"]
    assert len(part["validation"]) > 0


def test_noise_touches_training_labels_only_and_keeps_the_true_ones():
    clean, _ = prepared({"train": digits()}, validation_size=0.1)
    noisy, _ = prepared({"train": digits()}, validation_size=0.1, label_noise=0.4)
    for name in ("validation", "test"):
        assert noisy[name]["label"] == clean[name]["label"]
    assert noisy["train"]["clean_label"] == clean["train"]["label"]
    wrong = column(noisy["train"], "label") != column(clean["train"], "label")
    assert wrong.sum() == round(0.4 * len(wrong))
    assert noisy["train"].features["label"].names == list("0123456789")


def test_streaming_reads_without_a_copy(tmp_path):
    stand_ins.write("texts", tmp_path)
    splits = load_splits(DataArguments(dataset=str(tmp_path), streaming=True))
    assert all(isinstance(split, IterableDataset) for split in splits.values())
    splits, names = class_labels(splits, "label", DataArguments(streaming=True))
    assert names == ["no", "yes"]
    assert next(iter(splits["test"]))["label"] == 0


def test_streamed_words_become_classes_by_the_names_given(tmp_path):
    args = DataArguments(dataset=write(tmp_path / "a.csv"), streaming=True, class_names=["yes", "no"])
    with pytest.raises(UserError, match="cannot split off a test split"):
        load_splits(args)
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    splits, _ = class_labels({"train": stream}, "label", args)
    assert [row["label"] for row in splits["train"]][:3] == [1, 0, 1]


def test_whole_numbers_as_classes_are_ordered_as_numbers():
    rows = Dataset.from_dict({"x": ["a"] * 24, "label": [10, 9, 2] * 8})
    splits, names = prepared({"train": rows, "test": rows})
    assert names == ["2", "9", "10"]
    assert splits["train"]["label"][:3] == [2, 1, 0]


def test_a_class_that_only_the_test_split_has():
    train = Dataset.from_dict({"label": ["a", "b"] * 4})
    with pytest.raises(UserError, match="The test split has 'c' in label, which is not one of the classes a, b"):
        prepared({"train": train, "test": Dataset.from_dict({"label": ["a", "c"]})})


def test_a_test_split_without_labels():
    features = Features({"label": ClassLabel(names=["a", "b"])})
    train = Dataset.from_dict({"label": [0, 1] * 4}, features=features)
    test = Dataset.from_dict({"label": [-1] * 4}, features=features)
    with pytest.raises(UserError, match=r"The test split has examples without a class .* choose .* with --test_split"):
        prepared({"train": train, "test": test})


def test_several_labels():
    features = Features({"label": List(ClassLabel(names=["a", "b", "c"]))})
    rows = Dataset.from_dict({"label": [[0], [], [1, 2]]}, features=features)
    splits, names = multi_hot_labels({"train": rows}, "label", DataArguments())
    assert names == ["a", "b", "c"]
    assert splits["train"]["label"] == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]


def test_several_labels_as_words_with_commas():
    rows = Dataset.from_dict({"label": ["b", "", "a, c"]})
    splits, names = multi_hot_labels({"train": rows}, "label", DataArguments())
    assert names == ["a", "b", "c"]
    assert splits["train"]["label"] == [[0, 1, 0], [0, 0, 0], [1, 0, 1]]


def test_several_labels_as_a_vector_of_zeros_and_ones():
    train = Dataset.from_dict({"label": [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]})
    splits, names = multi_hot_labels({"train": train, "test": train}, "label", DataArguments())
    assert names == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert splits["train"]["label"] == train["label"]
    with pytest.raises(UserError, match="class_names has 2 names, but label has 3 values per example"):
        multi_hot_labels({"train": train}, "label", DataArguments(class_names=["a", "b"]))
    with pytest.raises(UserError, match="The test split has 1 example without 3 values of 0 or 1 in label: row 1"):
        test = Dataset.from_dict({"label": [[1, 0, 1], [2, 0, 1]]})
        multi_hot_labels({"train": train, "test": test}, "label", DataArguments())
    _, names = multi_hot_labels({"train": Dataset.from_dict({"label": [[0], [0, 1], [1]]})}, "label", DataArguments())
    assert names == ["0", "1"]  # lists of labels, not vectors


def test_numbers_to_predict():
    splits = numeric_labels({"train": Dataset.from_dict({"label": ["1.5", "2"]})}, "label")
    assert splits["train"]["label"] == [1.5, 2.0]
    assert splits["train"].features["label"] == Value("float32")


def test_column_of_the_users_choice_wins():
    splits = {"train": Dataset.from_dict({"text": ["a"], "review": ["b"]})}
    assert pick_column(splits, "review", ("text",), "text_column") == "review"
    assert pick_column(splits, None, ("text", "review"), "text_column", taken=["text"]) == "review"


# --- how a text file is written ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_encoding_and_delimiter_of_a_csv_file_are_found(encoding, delimiter, tmp_path, capsys):
    rows = [("Müller, der Jüngere; gut", "schön"), ("größer | daß", "übel"), ("très bien, déjà vu", "schön")] * 8
    text = f"text{delimiter}label\n" + "".join(f'"{text}"{delimiter}{label}\n' for text, label in rows)
    (tmp_path / "a.csv").write_bytes(text.encode(encoding))
    splits = load_splits(DataArguments(dataset=str(tmp_path / "a.csv")))
    assert splits["train"]["text"][:3] == [text for text, _ in rows[:3]]
    assert splits["train"]["label"][:3] == ["schön", "übel", "schön"]
    told = capsys.readouterr().out
    assert ("--csv_encoding" in told) == (encoding != "utf-8")
    assert (f"with {delimiter!r} between columns" in told) == (delimiter != ",")


def test_an_encoding_that_is_not_western_is_found_too(tmp_path):
    text = "text;label\n" + "Привет, мир;хорошо\nПлохой фильм;плохо\n" * 8
    (tmp_path / "a.csv").write_bytes(text.encode("cp1251"))
    splits = load_splits(DataArguments(dataset=str(tmp_path / "a.csv")))
    assert splits["train"]["label"][:2] == ["хорошо", "плохо"]


def test_one_column_of_texts_with_commas_stays_one_column(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + '"one, two"\n"three; four; five"\n' * 4)
    assert load_splits(DataArguments(dataset=str(tmp_path / "a.csv")))["train"].column_names == ["text"]


def test_a_text_may_be_longer_than_pythons_limit_of_a_field(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "word " * 40_000 + ",a\nshort,b\n")
    assert len(load_splits(DataArguments(dataset=str(tmp_path / "a.csv")))["train"]["text"][0]) == 200_000


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_in_another_encoding_is_refused(suffix, tmp_path):
    (tmp_path / f"a.{suffix}").write_bytes('{"text": "caf\xe9", "label": 1}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=f"a.{suffix} is not in UTF-8, as JSON must be; save it as UTF-8"):
        load_splits(DataArguments(dataset=str(tmp_path / f"a.{suffix}")))


def test_what_is_asked_for_is_not_guessed(tmp_path):
    (tmp_path / "a.csv").write_bytes("a;b,c\n\xe9;1,2\n".encode("cp1252") * 3)
    args = DataArguments(dataset=str(tmp_path / "a.csv"), csv_delimiter=";", csv_encoding="cp1252")
    assert load_splits(args)["train"].column_names == ["a", "b,c"]


def test_validation_samples_are_drawn_by_class():
    splits, _ = prepared({"train": digits()}, validation_size=0.2, validation_samples=50, test_samples=20)
    assert {name: len(split) for name, split in splits.items()} == {"train": 1078, "test": 20, "validation": 50}
    assert np.bincount(column(splits["validation"], "label")).min() >= 4


# --- what is told before training ----------------------------------------------------------------------------------


def test_the_summary_counts_classes_and_warns_of_rare_and_look_alike_ones():
    names = ["good", "bad", "Bad ", "positive", "postive", "class_10", "class_11"]
    labels = [0] * 20 + [1] * 10 + [2] * 2 + [i for i in range(3, 7) for _ in range(6)]
    train = Dataset.from_dict({"label": labels}, features=Features({"label": ClassLabel(names=names)}))
    counted, rare, alike = classes({"train": train}, "label", names)
    assert counted.startswith("7 classes in train: good 20, bad 10, positive 6,")
    assert counted.endswith("always predicting good gives 35.7 % accuracy")
    assert rare.startswith("!One class has fewer than 5 training examples: Bad  (2).")
    assert alike.startswith("!Class names that may mean the same: 'bad' and 'Bad ', 'positive' and 'postive'.")
    assert look_alikes(["cat", "dog", "1", "2", "sports", "world"]) == []


def test_what_max_length_cuts_is_measured(tokenizer):
    train = Dataset.from_dict({"text": ["so good"] * 6 + ["a fine film so good so bad no fun"] * 2})
    (line,) = truncation({"train": train}, ["text"], tokenizer, 4)
    assert line.startswith(
        "!max_length=4 cuts 25.0 % of the texts and 33.3 % of the tokens; half the texts have more than 2"
    )
    assert truncation({"train": train}, ["text"], tokenizer, 9) == [
        "no text is longer than max_length=9; the longest has 9 tokens"
    ]


@pytest.mark.parametrize(
    "labels", [["no", None, "yes"], [0.5, float("nan"), 1.5], [0, None, 1], [["a"], None, []]], ids=str
)
def test_examples_without_a_label_are_refused_or_dropped_whatever_the_type_of_the_labels(labels, capsys):
    splits = {"train": Dataset.from_dict({"text": ["a", "b", "c"], "label": labels})}
    with pytest.raises(
        UserError, match=r"train split has 1 example without a label in label: row 1 .*--drop_empty true"
    ):
        check_labelled(splits, "label", drop_empty=False)
    assert check_labelled(splits, "label", drop_empty=True)["train"]["text"][:] == ["a", "c"]
    assert "1 example without a label in label dropped from train: row 1" in capsys.readouterr().out


def test_infinite_labels_are_refused():
    with pytest.raises(UserError, match=r"1 empty or infinite value in label: row 1"):
        numeric_labels({"train": Dataset.from_dict({"label": [0.5, float("inf")]})}, "label")
