"""What users get wrong: every case ends in one line that names the thing, and no traceback of ours."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import stand_ins
from datasets import ClassLabel, Dataset, Features, Image, Value

from hf_sam.tasks.command_line import errors

IMAGES, TEXTS, LANGUAGE = "image_classification", "text_classification", "causal_lm"
PAIRS, WORDS = "seq2seq", "token_classification"
TINY = [
    "--use_cpu=true",
    "--disable_tqdm=true",
    "--max_steps=1",
    "--save_strategy=no",
    "--per_device_train_batch_size=2",
]


def complaint(recipe: str, argv: list[str], monkeypatch, capsys) -> str:
    """What a program prints and how it ends, as the shell sees it."""
    module = importlib.import_module(f"hf_sam.tasks.{recipe}")
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *argv])
    with pytest.raises(SystemExit) as ended:
        errors.run(module.main)
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(lines)
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1
    return lines[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data and configurations that are wrong in one way each."""
    tmp_path = tmp_path_factory.mktemp("wrong")
    (tmp_path / "images").mkdir()
    stand_ins.write("images", tmp_path / "images")
    (tmp_path / "texts").mkdir()
    stand_ins.write("texts", tmp_path / "texts")
    (tmp_path / "corpus").mkdir()
    stand_ins.write("corpus", tmp_path / "corpus")
    for name in ("Helsinki-NLP/opus_books", "knkarthick/samsum", "words"):
        (tmp_path / Path(name).name).mkdir()
        stand_ins.write(name, tmp_path / Path(name).name)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/a.csv").write_text("text,label\na,0\n")
    (tmp_path / "mixed/b.json").write_text('{"text": "a", "label": 0}\n')
    files = {
        "typo.yaml": "lerning_rate: 1e-3\n",
        "epochs.yaml": "epochs: 3\n",
        "broken.yaml": "a: [1, 2\n",
        "twice.yaml": "max_steps: 3\nmax_steps: 4\n",
        "list.yaml": "- a\n- b\n",
        "loop.yaml": "base: loop.yaml\n",
        "orphan.yaml": "base: parent.yaml\n",
        "binary.yaml": "\x00\x01",
        "half.json": '[{"text": "a fine film", "label": 0}, {"text":',
        "zero.csv": "",
        "twice.csv": "text,text\na,b\n",
        "data.txt": "text\n",
        "holes.csv": "text,label\na fine film,0\n,1\nso good,0\nso bad,1\n",
        "ids.csv": "text,label\n" + "".join(f"good fun,{i}\n" for i in range(50)),
        "one.csv": "text,label\n" + "so good,1\n" * 8,
        "titles.json": json.dumps(
            [{"text": text, "label": i % 2} for i, text in enumerate(["Alien", 1776, 300, "Up"])]
        ),
        "semicolons.csv": "text;label\n" + "so good;1\nso bad, alas, and long;0\n" * 4,
        "words.csv": "text,label\n" + "so good,much\n" * 4 + "so bad,little\n" * 4,
        "no_label.csv": "text,label\n" + "so good,1\nso bad,0\n" * 4 + "no fun,\n",
    }
    rows = [{"tokens": ["so", "good"], "tags": ["O", "B-X"]}] * 8
    files |= {
        f"{name}.jsonl": "\n".join(json.dumps(row) for row in [*rows, wrong])
        for name, wrong in {
            "uneven": {"tokens": ["so", "bad"], "tags": ["O"]},
            "wordless": {"tokens": [], "tags": []},
            "untagged": {"tokens": ["so", "bad"], "tags": ["O", None]},
        }.items()
    }
    files["one_tag.jsonl"] = "\n".join([json.dumps({"tokens": ["so"], "tags": ["O"]})] * 8)
    files["rare.csv"] = "text,label\n" + "so good,0\n" * 90 + "".join(f"so bad,{i}\n" * 4 for i in range(1, 10))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.csv").write_bytes("text,label\na film,0\nt\xe9 bon,1\n".encode("latin-1") * 4)
    image = {"bytes": b"no image at all", "path": "scans/cell_7.png"}
    good = {"bytes": (tmp_path / "x.png", stand_ins.image(0).save(tmp_path / "x.png"))[0].read_bytes(), "path": None}
    rows = {"image": [good, good, image, good] * 2, "label": [0, 1] * 4}
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "scans.parquet")
    rows = {"image": [1.0, 2.0] * 4, "label": [0, 1] * 4}
    Dataset.from_dict(rows).to_parquet(tmp_path / "numbers.parquet")
    rows = {"text": ["so good", "so bad"] * 4, "label": list(np.linspace(0, 1, 8))}
    Dataset.from_dict(rows, features=Features({"text": Value("string"), "label": Value("float64")})).to_parquet(
        tmp_path / "scores.parquet"
    )
    rows = {"text": ["so good", "so bad"] * 4, "label": [0] * 8}
    features = Features({"text": Value("string"), "label": ClassLabel(names=["never", "seen"])})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "unseen.parquet")
    (tmp_path / "kept/checkpoint-5").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    return tmp_path


# Recipe, what is wrong on its command line ({} is the folder above), what the line must say.
CASES = {
    # the command line and the configuration file
    "unknown key": (
        IMAGES,
        ["--lerning_rate", "1"],
        "'lerning_rate' is not an argument .* Did you mean 'learning_rate'",
    ),
    "usual name of another program": (IMAGES, ["--lr", "1"], "'lr' is not .* Did you mean 'learning_rate'"),
    "usual name of the batch": (TEXTS, ["--batch_size=4"], "Did you mean 'per_device_train_batch_size'"),
    "usual name in a file": (LANGUAGE, ["{}/epochs.yaml"], "epochs.yaml: 'epochs' .* 'num_train_epochs'"),
    "unknown sam key": (IMAGES, ["--sam_roh", "1"], "Did you mean 'sam_rho'"),
    "unknown key in a file": (IMAGES, ["{}/typo.yaml"], "typo.yaml: 'lerning_rate' .* 'learning_rate'"),
    "no such file": (IMAGES, ["{}/digit.yaml"], "digit.yaml does not exist. .* contains: .*typo.yaml"),
    "broken yaml": (IMAGES, ["{}/broken.yaml"], "broken.yaml is not valid YAML"),
    "yaml with a key twice": (IMAGES, ["{}/twice.yaml"], "twice.yaml is not valid YAML: 'max_steps' is given twice"),
    "yaml of control characters": (IMAGES, ["{}/binary.yaml"], "binary.yaml is not valid YAML"),
    "yaml without keys": (IMAGES, ["{}/list.yaml"], "must contain lines of the form `key: value`"),
    "yaml that is its own base": (IMAGES, ["{}/loop.yaml"], "is its own base"),
    "base that is missing": (IMAGES, ["{}/orphan.yaml"], "parent.yaml does not exist"),
    "file after the options": (IMAGES, ["--seed", "1", "{}/typo.yaml"], "is not an argument; give `--key value` pairs"),
    "word for a number": (IMAGES, ["--learning_rate", "fast"], "learning_rate.*: invalid float value: 'fast'"),
    "no value": (IMAGES, ["--learning_rate"], "learning_rate.*: expected one argument"),
    "word for a switch": (IMAGES, ["--streaming", "perhaps"], "Truthy value expected: got perhaps"),
    "unknown choice": (IMAGES, ["--eval_strategy", "often"], "often.*is not a valid|invalid choice: 'often'"),
    "unknown optimizer": (IMAGES, ["--optim", "adamx"], "adamx"),
    "broken json": (TEXTS, ["--config_overrides", "{{hidden"], "config_overrides=.* is not valid JSON"),
    # SAM
    "unknown method": (TEXTS, ["--sam_method", "sma"], "sam_method='sma' is unknown. Did you mean 'sam'"),
    "negative rho": (TEXTS, ["--sam_rho=-1"], r"sam_rho=-1.0 must be a number in \[0, inf\)"),
    "p below one": (TEXTS, ["--sam_p", "0.5"], r"sam_p=0.5 must be a number in \[1, inf\]"),
    "unknown scope": (TEXTS, ["--sam_scope", "world"], "sam_scope='world' is unknown"),
    "start after end": (TEXTS, ["--sam_start", "0.9", "--sam_end", "0.1"], "sam_start=0.9 must be below end=0.1"),
    "start that is no moment": (TEXTS, ["--sam_start", "soon"], "sam_start: .*soon"),
    "start beyond the run": (TEXTS, ["--sam_start", "1.5"], "sam_start=1.5 must be a step .* or a fraction"),
    "perturb that matches nothing": (
        TEXTS,
        ["--dataset={}/texts", "--model_name_or_path=ENCODER", "--sam_perturb=*.attnetion.*"],
        r"\*\.attnetion\.\*",
    ),
    # the model
    "no model": (TEXTS, ["NO_MODEL", "--dataset={}/texts"], "exactly one of model_name_or_path .* and model_type"),
    "model that is not there": (TEXTS, ["--dataset={}/texts", "--model_name_or_path={}/no/model"], "does not exist"),
    "hub model offline": (TEXTS, ["--dataset={}/texts", "--model_name_or_path=a/b"], "a/b is not a local folder"),
    "folder without a model": (TEXTS, ["--dataset={}/texts", "--model_name_or_path={}/nothing"], "cannot be loaded"),
    "unknown model type": (IMAGES, ["NO_MODEL", "--dataset={}/images", "--model_type=vitt"], "Did you mean 'vit'"),
    "unknown override": (
        IMAGES,
        ["--dataset={}/images", '--config_overrides={{"hiden_size": 8}}'],
        "'hiden_size' is not a field of ViTConfig. Did you mean 'hidden_size'",
    ),
    "override that cannot be": (
        IMAGES,
        [
            "NO_MODEL",
            "--model_type=vit",
            "--dataset={}/images",
            '--config_overrides={{"hidden_act": "gelo", "hidden_size": 12}}',
        ],
        "The model cannot be created",
    ),
    "model of another kind": (
        IMAGES,
        ["--dataset={}/images", "--model_name_or_path=DECODER"],
        "cannot be loaded as AutoImageProcessor",
    ),
    "model of another task": (LANGUAGE, ["--dataset={}/corpus", "--model_name_or_path=VISION"], "tokenizer|vit"),
    "image size of another model": (IMAGES, ["--dataset={}/images", "--image_size=24"], "image_size=24 must be 16"),
    "length beyond the model": (TEXTS, ["--dataset={}/texts", "--max_length=999"], "max_length=999 .* at most 256"),
    "no tokenizer": (LANGUAGE, ["NO_MODEL", "--dataset={}/corpus", "--model_type=gpt2"], "give --tokenizer_name"),
    "lora on no module": (
        LANGUAGE,
        ["--dataset={}/corpus", "--lora_r=2", "--lora_target_modules", "q_porj"],
        "lora_target_modules: .*q_porj",
    ),
    # the data
    "no data": (TEXTS, [], "Give --dataset"),
    "data that are not there": (TEXTS, ["--dataset={}/texst"], "texst does not exist. Did you mean 'texts'"),
    "hub data offline": (TEXTS, ["--dataset=stanfordnlp/imdb"], "stanfordnlp/imdb is not a local file .* offline"),
    "empty folder": (TEXTS, ["--dataset={}/nothing"], "contains no images and no csv, json or parquet"),
    "folder of two kinds": (TEXTS, ["--dataset={}/mixed"], "several kinds"),
    "unknown suffix": (TEXTS, ["--dataset={}/data.txt"], "an unknown suffix. Allowed: .csv"),
    "empty file": (TEXTS, ["--dataset={}/zero.csv"], "zero.csv is empty"),
    "half a file": (TEXTS, ["--dataset={}/half.json"], "half.json is not valid JSON"),
    "column twice": (TEXTS, ["--dataset={}/twice.csv"], "two columns of the same name"),
    "missing split": (TEXTS, ["--dataset={}/texts", "--test_split=dev"], "test_split=dev .* has: test, train"),
    "same split twice": (TEXTS, ["--dataset={}/texts", "--test_split=train"], "same split as train_split"),
    "missing column": (
        TEXTS,
        ["--dataset={}/texts", "--text_column=txt"],
        "txt is not a column of .* text, label.* Did you mean 'text'",
    ),
    "missing label": (TEXTS, ["--dataset={}/texts", "--label_column=y"], "y is not a column of .* text, label"),
    "no column found": (IMAGES, ["--dataset={}/texts"], "No column found for image_column. .* text, label"),
    "texts that are no texts": (TEXTS, ["--dataset={}/images", "--text_column=image"], "contains Image.*, not text"),
    "images that are no images": (
        IMAGES,
        ["--dataset={}/numbers.parquet"],
        "image_column=image contains .*, not images",
    ),
    "image that does not open": (IMAGES, ["--dataset={}/scans.parquet"], r"image \d .*cell_7.png\) cannot be opened"),
    "labels that are no classes": (TEXTS, ["--dataset={}/ids.csv"], "50 different values .* too many to be classes"),
    "numbers as classes": (
        TEXTS,
        ["--dataset={}/scores.parquet", "--problem_type=single_label_classification"],
        ", not classes",
    ),
    "words as numbers": (TEXTS, ["--dataset={}/words.csv", "--problem_type=regression"], "not numbers"),
    "empty text": (
        TEXTS,
        ["--dataset={}/holes.csv"],
        r"1 example without text in text: row 1 \(counting from 0\)\. .*drop_empty",
    ),
    "empty label": (
        TEXTS,
        ["--dataset={}/no_label.csv"],
        r"1 example without a label in label: row 8 .*Remove them, or give --drop_empty true",
    ),
    "texts and numbers": (TEXTS, ["--dataset={}/titles.json"], 'text_column=text .* several types, .* as "1984"'),
    "numbers as texts": (
        TEXTS,
        ["--dataset={}/scores.parquet", "--text_column=label", "--label_column=text"],
        "label of .*float64.*, not text",
    ),
    "wrong delimiter": (TEXTS, ["--dataset={}/semicolons.csv", "--csv_delimiter=,"], "Leave out --csv_delimiter ','"),
    "one class": (TEXTS, ["--dataset={}/one.csv"], "only the class 1"),
    "class that is never seen": (TEXTS, ["--dataset={}/unseen.parquet"], "no example of class seen"),
    "samples that leave a class out": (
        TEXTS,
        ["--dataset={}/rare.csv", "--train_samples=12"],
        r"train_samples=12, .*, has no example of [0-9, ]+ in label; give at least --train_samples \d+, or "
        r"--train_samples_per_class 1 ",
    ),
    "validation samples without a split": (
        TEXTS,
        ["--dataset={}/texts", "--validation_samples=4"],
        "needs a validation split: give --validation_size 0.1",
    ),
    "csv in no encoding of that name": (
        TEXTS,
        ["--dataset={}/latin.csv", "--csv_encoding=latin-99"],
        "csv_encoding=latin-99 is unknown; try utf-8",
    ),
    "csv in another encoding": (
        TEXTS,
        ["--dataset={}/latin.csv", "--csv_encoding=utf-8"],
        r"is not in csv_encoding=utf-8 \(see line 3\)",
    ),
    "delimiter of two characters": (TEXTS, ["--csv_delimiter=::"], "csv_delimiter='::' must be one character, or tab"),
    "several broken images": (
        IMAGES,
        ["--dataset={}/scans.parquet", "--check_images=all"],
        r"\d of \d checked images are broken: .*cell_7.png\) cannot be opened: no image.*Remove these rows",
    ),
    "unknown check of images": (IMAGES, ["--check_images=some"], "check_images=some is unknown. Allowed: sample, all"),
    "too many samples": (TEXTS, ["--dataset={}/texts", "--train_samples=999"], "999 examples .* only 12"),
    "too many a class": (
        TEXTS,
        ["--dataset={}/texts", "--train_samples_per_class=9"],
        "smallest class has only 6 examples; give at most 6, or --train_samples 12 ",
    ),
    "noise above one": (TEXTS, ["--label_noise=1.5"], r"label_noise=1.5 must be a fraction in \[0, 1\)"),
    "noise on a stream": (TEXTS, ["--streaming=true", "--label_noise=0.2"], "label_noise needs the whole split"),
    "noise on texts alone": (LANGUAGE, ["--dataset={}/corpus", "--label_noise=0.2"], "label_noise needs labels"),
    "unknown augmentation": (IMAGES, ["--augmentation=blur"], "augmentation=blur is unknown. Allowed: none, crop"),
    "unknown task": (TEXTS, ["--glue_task=sst"], "glue_task=sst is unknown. Allowed: cola"),
    "unknown trainer": (LANGUAGE, ["--trainer=dpo"], "trainer=dpo is unknown. Allowed: sft, plain"),
    "hub metric offline": (TEXTS, ["--dataset={}/texts", "--hub_metrics", "bleurt"], "bleurt cannot be loaded"),
    # texts as targets
    "unknown named task": (PAIRS, ["--glue_task=sst"], "glue_task=sst is unknown. Allowed: cola"),
    "kind of target twice": (PAIRS, ["--glue_task=cola", "--target_column=t"], "target_column is set by glue_task"),
    "unknown kind of target": (PAIRS, ["--problem_type=qa"], "problem_type=qa is unknown. Allowed: classification"),
    "no target": (PAIRS, ["--dataset={}/corpus"], "No column found for the targets. .*--target_column"),
    "no end of a target": (PAIRS, ["--max_target_length=1"], "max_target_length=1 must be at least 2"),
    "word that is cut": (
        PAIRS,
        ["--dataset={}/texts", "--max_target_length=2", "--label_words", "so bad", "good"],
        "max_target_length=2 cuts the word 'so bad', which has 3 tokens including end of sequence; give at least 3",
    ),
    "words that the tokenizer does not know": (
        PAIRS,
        ["--dataset={}/texts", "--label_words", "splendid", "awful"],
        "The word 'splendid' decodes to ''.*--label_words",
    ),
    "words that are the same": (
        PAIRS,
        ["--dataset={}/texts", "--label_words", "good", "good"],
        "'good' decodes to 'good', as 'good' does",
    ),
    "too few words": (PAIRS, ["--dataset={}/texts", "--label_words", "good"], r"has 1 words .* 2 classes: no, yes"),
    "noise on summaries": (
        PAIRS,
        ["--dataset={}/samsum", "--label_noise=0.2"],
        "label_noise does not apply to problem_type=summarization",
    ),
    "no languages": (PAIRS, ["--dataset={}/opus_books"], "Give --source_lang: en, fr"),
    "unknown language": (
        PAIRS,
        ["--dataset={}/opus_books", "--source_lang=en", "--target_lang=de"],
        "target_lang=de is not one of the languages in translation: en, fr",
    ),
    "numbers that the tokenizer cannot reproduce": (
        PAIRS,
        ["--dataset={}/scores.parquet", "--problem_type=regression", "--tokenizer_name=ENCODER"],
        "The tokenizer does not reproduce '0.0' within max_target_length=128",
    ),
    "no encoder": (
        PAIRS,
        ["--dataset={}/samsum", "--model_name_or_path=DECODER"],
        "llama has no AutoModelForSeq2SeqLM",
    ),
    "generation that is not there": (
        PAIRS,
        ["--dataset={}/texts", "--generation_config={}/nothing"],
        "generation_config=.*nothing: ",
    ),
    # tagged words
    "words that are none": (WORDS, ["--dataset={}/texts"], "No column found for words_column"),
    "texts as words": (
        WORDS,
        ["--dataset={}/texts", "--words_column=text", "--label_column=label"],
        "words_column=text .* contains .*, not lists",
    ),
    "tags that are not one a word": (
        WORDS,
        ["--dataset={}/uneven.jsonl"],
        r"1 examples with a different number of tags and tokens: row 8 \(counting from 0\)",
    ),
    "word without a tag": (WORDS, ["--dataset={}/untagged.jsonl"], "different number of tags and tokens: row 8"),
    "sentence without words": (WORDS, ["--dataset={}/wordless.jsonl"], "without words in tokens: row 8 .*--drop_empty"),
    "one tag": (WORDS, ["--dataset={}/one_tag.jsonl"], "tags has only the tag O"),
    "too few names of tags": (
        WORDS,
        ["--dataset={}/words", "--class_names", "O", "B-X"],
        "class_names has 2 names, but tags has 3 tags",
    ),
    "noise on tags": (WORDS, ["--dataset={}/words", "--label_noise=0.2"], "label_noise needs one class per example"),
    "stream of tags": (WORDS, ["--dataset={}/words", "--streaming=true"], "streaming does not work with tagged words"),
    # the run
    "evaluation without a split": (TEXTS, ["--dataset={}/texts", "--eval_strategy=epoch"], "--validation_size 0.1"),
    "stream without an end": (TEXTS, ["--dataset={}/texts", "--streaming=true", "--max_steps=-1"], "give --max_steps"),
    "unknown metric": (
        IMAGES,
        ["--dataset={}/images", "--metric_for_best_model=acuracy"],
        "metric_for_best_model=acuracy is not a metric .* Did you mean 'accuracy'. Allowed: accuracy, .*loss",
    ),
    "metric of other labels": (
        TEXTS,
        ["--dataset={}/texts", "--metric_for_best_model=eval_pearson"],
        "metric_for_best_model=eval_pearson is not a metric of this task",
    ),
    "metric of other tasks": (
        LANGUAGE,
        ["--dataset={}/corpus", "--metric_for_best_model=accuracy"],
        "is not a metric of this task.* Allowed: perplexity",
    ),
    "no learning rate": (TEXTS, ["--dataset={}/texts", "--learning_rate=0"], "learning_rate=0.0 must be above 0"),
    "no batch": (TEXTS, ["--dataset={}/texts", "--per_device_train_batch_size=0"], "must be at least 1"),
    "tracker that is not installed": (
        TEXTS,
        ["--dataset={}/texts", "--report_to=comet_ml"],
        r"report_to=comet_ml: its package is not installed\. Run pip install .*--report_to none",
    ),
    "unknown tracker": (
        TEXTS,
        ["--report_to=wandbb"],
        "report_to=wandbb is not a tracker known .* Did you mean 'wandb'",
    ),
    "optimizer that is not installed": (
        TEXTS,
        ["--dataset={}/texts", "--optim=adamw_bnb_8bit"],
        "optim=adamw_bnb_8bit: .*bitsandbytes",
    ),
    "output that is a file": (TEXTS, ["--dataset={}/texts", "--output_dir={}/file"], "is a file; choose a folder"),
    "output inside a file": (TEXTS, ["--output_dir={}/file/run"], "/file/run cannot be created .*; choose another"),
    "output with a run in it": (TEXTS, ["--output_dir={}/kept"], "already contains checkpoint-5. .*--resume_from_"),
    "checkpoint that is not there": (
        TEXTS,
        ["--resume_from_checkpoint={}/no"],
        "not a complete checkpoint: there is no",
    ),
    "checkpoint that is half": (TEXTS, ["--resume_from_checkpoint={}/kept/checkpoint-5"], "trainer_state.json missing"),
    "resume and overwrite": (TEXTS, ["--overwrite_output_dir=true", "--resume_from_checkpoint=auto"], "not both"),
}


# Older versions of datasets leave a csv file open that they could not read.
@pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("case", CASES)
def test_mistake_ends_in_one_line(case, folder, encoder, decoder, vision, text_to_text, monkeypatch, capsys):
    recipe, wrong, expected = CASES[case]
    words = [
        word.format(folder).replace("ENCODER", encoder).replace("DECODER", decoder).replace("VISION", vision)
        for word in wrong
    ]
    files = [word for word in words[:1] if word.endswith(".yaml")]
    model = {IMAGES: vision, TEXTS: encoder, LANGUAGE: decoder, PAIRS: text_to_text, WORDS: encoder}[recipe]
    defaults = [] if "NO_MODEL" in words else [f"--model_name_or_path={model}"]
    defaults += [f"--output_dir={folder}/out", *TINY]
    if recipe == LANGUAGE:
        defaults.append("--activation_checkpointing=false")
    rest = [word for word in words[len(files) :] if word != "NO_MODEL"]
    line = complaint(recipe, [*files, *defaults, *rest], monkeypatch, capsys)
    assert re.search(expected, line), line
    assert len(line) < 1000


def test_a_bug_keeps_its_traceback():
    def main():
        raise ValueError("of nobody's making")

    with pytest.raises(ValueError, match="of nobody"):
        errors.run(main)


def test_only_the_first_process_complains(monkeypatch, capsys):
    def main():
        raise errors.UserError("wrong")

    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        errors.run(main)
    assert capsys.readouterr().err == ""


def test_error_in_a_worker_is_still_one_line():
    text = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File\n"
    error = errors.UserError(
        text + "hf_sam.tasks.command_line.errors.UserError: train image 3 cannot be opened: no image"
    )
    assert errors.one_line(error) == "train image 3 cannot be opened: no image"
