"""`recipes/token_classification.py`: labels and tokens aligned, the stock Trainer's run, what is kept and measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SENTENCES
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForTokenClassification, Trainer, TrainingArguments, pipeline

from hf_sam.experiments.records import read_record
from hf_sam.rho_search.scores import constant_scores, example_scores
from hf_sam.tasks import report, sharpness, token_classification
from hf_sam.tasks.command_line.arguments import parse_arguments
from hf_sam.tasks.command_line.errors import UserError
from hf_sam.tasks.command_line.options import DataArguments
from hf_sam.tasks.data.words import align, continuing_tags

QUIET = ["--use_cpu=true", "--disable_tqdm=true", "--logging_steps=1", "--seed=1"]
TAGS = {"good": "B-MOOD", "bad": "B-MOOD", "fun": "I-MOOD"}


def sentences(count: int = 24) -> list[dict]:
    rows = [SENTENCES[i % 8].split() for i in range(count)]
    return [{"tokens": row, "tags": [TAGS.get(word, "O") for word in row]} for row in rows]


def write(rows: list[dict], folder: Path) -> Path:
    path = folder / "words.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def run(rows: list[dict], model: str, folder: Path, *words: str):
    argv = [f"--dataset={write(rows, folder)}", f"--model_name_or_path={model}", *QUIET, "--max_steps=2"]
    return token_classification.main([*argv, f"--output_dir={folder / 'out'}", "--save_strategy=no", *words])


def logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# --- alignment ---------------------------------------------------------------------------------------------------------


def test_a_label_goes_to_the_first_token_of_a_word_or_to_all_as_inside():
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    word_ids = [None, 0, 0, 0, 1, 2, 2, None, None]
    assert align(word_ids, [1, 0, 3]) == [-100, 1, -100, -100, 0, 3, -100, -100, -100]
    assert continuing_tags(names) == [0, 2, 2, 3], "there is no I-LOC"
    assert align(word_ids, [1, 0, 3], continuing_tags(names)) == [-100, 1, 2, 2, 0, 3, 3, -100, -100]


def test_all_tokens_are_learnt_and_each_word_is_evaluated_once(encoder, tmp_path):
    rows = [{"tokens": ["so-good", "fun"], "tags": ["B-MOOD", "O"]}, {"tokens": ["no", "fun"], "tags": ["O", "I-MOOD"]}]
    trainer = run(rows * 8, encoder, tmp_path, "--label_all_tokens=true")
    labels = {tuple(row["labels"]) for row in trainer.train_dataset}
    names = trainer.model.config.id2label
    words = {tuple(names.get(label) for label in row) for row in labels}
    assert words == {("B-MOOD", "I-MOOD", "I-MOOD", "O"), ("O", "I-MOOD")}  # so, -, good, fun
    kept = pd.read_parquet(tmp_path / "out/test_predictions.parquet")
    assert set(kept["answers"]) == {2}


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ["B-MOOD", "I-MOOD", "O"]),
        (["--class_names", "O", "I-MOOD", "B-MOOD"], ["O", "I-MOOD", "B-MOOD"]),
    ],
)
def test_tags_are_numbered_in_the_order_that_is_given_or_found(words, names, tmp_path):
    path = write(sentences(), tmp_path)
    data_args, word_args = parse_arguments(
        [DataArguments, token_classification.WordArguments], [f"--dataset={path}", *words]
    )
    splits, words_column, label_column, found = token_classification.read_data(data_args, word_args)
    assert (words_column, label_column, found) == ("tokens", "tags", names)
    for row in splits["train"]:
        assert [names[tag] for tag in row["tags"]] == [TAGS.get(word, "O") for word in row["tokens"]]


def test_numbers_as_tags_may_be_named(tmp_path):
    path = write([{"words": ["so", "good"], "pos_tags": [0, 1]}] * 8, tmp_path)
    data_args, word_args = parse_arguments(
        [DataArguments, token_classification.WordArguments], [f"--dataset={path}", "--class_names", "ADV", "ADJ"]
    )
    splits, _, label_column, names = token_classification.read_data(data_args, word_args)
    assert (label_column, names) == ("pos_tags", ["ADV", "ADJ"])
    assert splits["train"][0]["pos_tags"] == [0, 1]


# --- the same run ------------------------------------------------------------------------------------------------------


def test_a_vanishing_rho_is_the_run_of_the_stock_trainer_to_the_last_bit(encoder, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(encoder, num_labels=3)
    AutoModelForTokenClassification.from_config(config).save_pretrained(tmp_path / "model")  # its head, too
    words = [f"--tokenizer_name={encoder}", "--learning_rate=1e-2", "--per_device_train_batch_size=4", "--max_steps=3"]
    ours = run(sentences(), str(tmp_path / "model"), tmp_path, *words, "--sam_rho=1e-30")
    args = TrainingArguments(
        output_dir=str(tmp_path / "stock"),
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        max_steps=3,
        logging_steps=1,
        seed=1,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
    )
    stock = Trainer(
        model=AutoModelForTokenClassification.from_pretrained(tmp_path / "model"),
        args=args,
        train_dataset=ours.train_dataset,
        data_collator=ours.data_collator,
    )
    stock.train()
    for name, parameter in stock.model.named_parameters():
        assert torch.equal(parameter, ours.model.get_parameter(name)), name
    assert logged(ours, "loss") == logged(stock, "loss")
    predicted, expected = (trainer.predict(ours.train_dataset) for trainer in (ours, stock))
    assert np.array_equal(predicted.predictions, expected.predictions)


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_accumulated_batches_are_the_one_batch_though_sentences_differ_in_length(rho, encoder, tmp_path):
    """Under SGD, where a gradient that is k times too large would show."""
    losses, found = [], []
    for size, count in ((8, 1), (4, 2)):
        folder = tmp_path / f"{size}x{count}"
        folder.mkdir()
        words = [f"--per_device_train_batch_size={size}", f"--gradient_accumulation_steps={count}"]
        words += ["--optim=sgd", "--max_grad_norm=0", "--learning_rate=0.2", f"--sam_rho={rho}"]
        words.append('--config_overrides={"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}')
        if rho:
            words.append("--sam_scope=global")
        losses.append(logged(run(sentences(), encoder, folder, *words), "loss"))
        found.append(load_file(folder / "out/model.safetensors"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


# --- what a run leaves -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, encoder) -> Path:
    """A run that learns the tags."""
    folder = tmp_path_factory.mktemp("run")
    words = ["--max_steps=40", "--learning_rate=1e-2", "--per_device_train_batch_size=8", "--sam_rho=0.01"]
    run(sentences(), encoder, folder, *words, "--logging_steps=10", "--evaluate_train")
    return folder / "out"


def test_entities_are_found_and_all_metrics_recorded(finished):
    record = read_record(finished / "run_record.json")
    assert record.metrics["entity_f1"] > 0.8
    assert record.metrics["train_entity_f1"] > 0.8
    assert set(token_classification.METRICS) <= set(record.metrics)
    assert record.data["train"]["examples"] == 18


def test_kept_predictions_give_the_metrics_and_what_a_search_for_rho_compares(finished):
    kept = pd.read_parquet(finished / "test_predictions.parquet")
    results = json.loads((finished / "all_results.json").read_text())
    true, chosen = np.concatenate(kept["label"]), np.concatenate(kept["prediction"])
    assert (true == chosen).mean() == pytest.approx(results["test_accuracy"])
    assert kept["nll"].sum() / len(true) == pytest.approx(results["test_nll"], rel=1e-6)
    scores = example_scores(kept)
    assert list(scores) == ["accuracy", "nll"]
    assert scores["accuracy"].value == pytest.approx(results["test_accuracy"])
    assert constant_scores(kept)["accuracy"].value == pytest.approx(np.bincount(true).max() / len(true))


def test_sharpness_is_of_the_mean_over_words(finished, tmp_path):
    words = ["--checkpoints", str(finished), "--measures=sam", "--disable_tqdm=true", "--num_examples=10"]
    found = sharpness.main([*words, f"--output_dir={tmp_path}", "--split=test", "--batch_size=3"])
    kept = pd.read_parquet(finished / "test_predictions.parquet")
    assert found["subset"]["labels"] == kept["answers"].sum()
    expected = kept["nll"].sum() / kept["answers"].sum()
    assert found["checkpoints"]["out"]["scalars"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_report_on_checkpoints_says_why_it_has_none(finished, tmp_path):
    with pytest.raises(
        UserError, match=r"do not support token-classification .* assume independent examples.*compare\.py"
    ):
        report.main([str(finished), f"--output_dir={tmp_path}"])


def test_the_fine_tuned_folder_loads_in_a_pipeline(finished):
    tag = pipeline("token-classification", model=str(finished), device="cpu")
    assert [entry["entity"] for entry in tag("so good")][-1] == "B-MOOD"


def test_parts_of_speech_have_no_entities(encoder, tmp_path):
    rows = [
        {"tokens": row["tokens"], "tags": ["X" if tag == "O" else "ADJ" for tag in row["tags"]]} for row in sentences()
    ]
    run(rows, encoder, tmp_path, "--validation_size=0.25", "--eval_strategy=steps", "--eval_steps=1")
    metrics = read_record(tmp_path / "out/run_record.json").metrics
    assert "f1_macro" in metrics
    assert not any("entity" in name for name in metrics)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
def test_adapters_train_the_head_as_well(encoder, tmp_path):
    trainer = run(sentences(), encoder, tmp_path, "--lora_r=2", "--lora_target_modules", "query", "value")
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name for name in trained)
    assert any("classifier" in name for name in trained)


def test_sentences_that_are_cut_are_told(encoder, tmp_path, capsys):
    rows = [*sentences(), {"tokens": ["fun"] * 20, "tags": ["O"] * 20}] * 2
    run(rows, encoder, tmp_path, "--max_length=8")
    printed = capsys.readouterr().out
    assert "warning: max_length=8 cuts" in printed
    assert "Words beyond it are neither trained on nor evaluated" in printed
    assert "3 tags of " in printed
