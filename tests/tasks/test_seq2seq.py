"""`recipes/seq2seq.py`: the stock `Seq2SeqTrainer`'s run, everything as text, and what is measured of what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import stand_ins
import torch
from conftest import SENTENCES
from datasets import Dataset
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hf_sam.experiments.records import read_record
from hf_sam.rho_search.scores import constant_scores, example_scores
from hf_sam.tasks import report, seq2seq, sharpness
from hf_sam.tasks.command_line.arguments import parse_arguments
from hf_sam.tasks.command_line.options import DataArguments
from hf_sam.tasks.data.text_to_text import NAMED_TASKS

QUIET = ["--use_cpu=true", "--disable_tqdm=true", "--logging_steps=1", "--seed=1", "--max_target_length=6"]
# Targets of 2 to 4 tokens, so that micro-batches have different numbers of them.
PAIRS = {"text": SENTENCES * 3, "target": [" ".join(text.split()[::-1]) for text in SENTENCES * 3]}


def run(rows: dict, model: str, folder: Path, *words: str):
    Dataset.from_dict(rows).to_parquet(folder / "data.parquet")
    argv = [f"--dataset={folder / 'data.parquet'}", f"--model_name_or_path={model}", *QUIET]
    return seq2seq.main([*argv, "--max_steps=2", f"--output_dir={folder / 'out'}", "--save_strategy=no", *words])


def logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# --- the same run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_vanishing_rho_is_the_run_of_the_stock_trainer_to_the_last_bit(smoothing, text_to_text, tmp_path):
    generation = GenerationConfig(num_beams=2, max_length=5, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    generation.save_pretrained(tmp_path / "generation")
    words = [f"--label_smoothing_factor={smoothing}", f"--generation_config={tmp_path / 'generation'}"]
    words += ["--learning_rate=1e-2", "--per_device_train_batch_size=4", "--max_steps=3", "--sam_rho=1e-30"]
    words += [
        "--per_device_eval_batch_size=6"
    ]  # of 18: the stock trainer lets a smaller last batch weigh like the others
    ours = run(PAIRS, text_to_text, tmp_path, *words)

    tokenizer = AutoTokenizer.from_pretrained(text_to_text)
    model = AutoModelForSeq2SeqLM.from_pretrained(text_to_text)
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path / "stock"),
        predict_with_generate=True,
        generation_config=str(tmp_path / "generation"),
        label_smoothing_factor=smoothing,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=6,
        max_steps=3,
        logging_steps=1,
        seed=1,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=False,
    )
    stock = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=ours.train_dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )
    stock.train()
    for name, parameter in stock.model.named_parameters():
        assert torch.equal(parameter, ours.model.get_parameter(name)), name
    for key in ("loss", "grad_norm"):
        assert logged(ours, key) == logged(stock, key)
        assert len(logged(ours, key)) == 3
    predicted, expected = (trainer.predict(ours.train_dataset) for trainer in (ours, stock))
    assert predicted.metrics["test_loss"] == expected.metrics["test_loss"]
    generated = predicted.predictions[0]
    assert generated.shape[1] == expected.predictions.shape[1] == 5, "the generation config's length"
    assert np.array_equal(generated, expected.predictions)


@pytest.mark.parametrize(("rho", "smoothing"), [(0.0, 0.0), (0.05, 0.0), (0.05, 0.1)])
def test_accumulated_batches_are_the_one_batch_though_their_targets_differ_in_length(
    rho, smoothing, text_to_text, tmp_path
):
    """Under SGD, where a gradient that is k times too large would show."""
    losses, found = [], []
    for size, count in ((8, 1), (4, 2)):
        folder = tmp_path / f"{size}x{count}"
        folder.mkdir()
        words = [f"--per_device_train_batch_size={size}", f"--gradient_accumulation_steps={count}"]
        words += ["--optim=sgd", "--max_grad_norm=0", "--learning_rate=0.2", f"--sam_rho={rho}"]
        words += [f"--label_smoothing_factor={smoothing}", '--config_overrides={"dropout_rate": 0}']
        if rho:
            words.append("--sam_scope=global")
        losses.append(logged(run(PAIRS, text_to_text, folder, *words), "loss"))
        found.append(weights(folder / "out"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


# --- everything as text ------------------------------------------------------------------------------------------------


def read(folder: Path, *words: str):
    data_args, text_args = parse_arguments([DataArguments, seq2seq.Seq2SeqArguments], [f"--dataset={folder}", *words])
    return seq2seq.read_data(data_args, text_args)


@pytest.mark.parametrize(
    ("task", "source", "target"),
    [
        ("cola", "cola sentence: a dull film", "acceptable"),
        ("mrpc", "mrpc sentence1: a dull film sentence2: a dull film", "equivalent"),
        ("stsb", "stsb sentence1: a dull film sentence2: a dull film", "0.0"),
        ("qqp", "qqp question1: a dull film question2: a dull film", "duplicate"),
        ("rte", "rte sentence1: a dull film sentence2: a dull film", "not_entailment"),
        ("boolq", "boolq passage: a dull film question: a dull film", "True"),
        ("cb", "cb hypothesis: a dull film premise: a dull film", "contradiction"),
        (
            "copa",
            "copa choice1: a dull film choice2: a dull film premise: a dull film question: a dull film",
            "choice2",
        ),
        ("wic", "wic sentence1: a dull film sentence2: a dull film word: a dull film", "True"),
    ],
)
def test_glue_is_written_as_t5_reads_it(task, source, target, tmp_path):
    folder = "glue" if f"glue/{task}" in stand_ins.COLUMNS else "aps/super_glue"
    stand_ins.write(f"{folder}/{task}", tmp_path)
    splits, kind, words = read(tmp_path, f"--glue_task={task}")
    assert splits["train"][1] | {"label": None} == {"source": source, "target": target, "label": None}
    assert kind == ("regression" if task == "stsb" else "classification")
    assert words == (list(NAMED_TASKS[task].words) or None) or {"entailment", "neutral"} < set(words)


def test_classes_that_a_copy_numbers_otherwise_keep_their_words(tmp_path):
    """In a csv the names are found in alphabetical order, which is not that of the benchmark."""
    rows = {"sentence1": SENTENCES * 2, "sentence2": SENTENCES * 2, "label": ["not_entailment", "entailment"] * 8}
    for split in ("train", "validation"):
        pd.DataFrame(rows).to_csv(tmp_path / f"{split}-00000.csv", index=False)
    splits, _, words = read(tmp_path, "--glue_task=wnli")
    assert words == ["entailment", "not_entailment"]
    for row in splits["train"]:
        assert row["target"] == words[row["label"]]
        first = SENTENCES.index(row["source"].split("sentence2: ")[1]) % 2
        assert row["target"] == ["not_entailment", "entailment"][first]


def test_noise_changes_the_words_of_the_training_split_alone(tmp_path):
    stand_ins.write("texts", tmp_path)
    splits, _, words = read(tmp_path, "--label_noise=0.25", "--label_words", "bad", "good")
    train, clean = splits["train"], np.array(splits["train"]["clean_label"])
    assert (np.array(train["label"]) != clean).sum() == 3
    assert list(train["target"]) == [words[label] for label in train["label"]]
    assert list(splits["test"]["target"]) == ["bad", "good"] * 6


def test_translations_are_read_by_language(tmp_path):
    stand_ins.write("Helsinki-NLP/opus_books", tmp_path)
    words = ["--source_lang=fr", "--target_lang=en", "--source_prefix=translate French to English: "]
    splits, kind, _ = read(tmp_path, *words)
    assert kind == "translation"
    rows = {row["source"]: row["target"] for split in splits.values() for row in split}
    assert rows["translate French to English: what a joy"] == "a dull film"
    assert set(splits) == {"train", "test"}


def test_summaries_are_found_by_their_column(tmp_path):
    stand_ins.write("knkarthick/samsum", tmp_path)
    splits, kind, words = read(tmp_path, "--source_prefix=summarize: ", "--train_samples=4")
    assert (kind, words, len(splits["train"])) == ("summarization", None, 4)
    assert splits["train"][0]["source"] == f"summarize: {splits['train'][0]['target']}"


def test_texts_are_streamed(text_to_text, tmp_path):
    for split, rows in (("train", PAIRS), ("test", {name: values[:8] for name, values in PAIRS.items()})):
        Dataset.from_dict(rows).to_parquet(tmp_path / f"{split}-00000.parquet")
    words = [f"--dataset={tmp_path}", f"--model_name_or_path={text_to_text}", *QUIET, "--streaming=true"]
    trainer = seq2seq.main([*words, "--max_steps=2", f"--output_dir={tmp_path / 'out'}", "--save_strategy=no"])
    assert trainer.state.global_step == 2
    assert list(pd.read_parquet(tmp_path / "out/test_predictions.parquet")["target"]) == PAIRS["target"][:8]


# --- what a run leaves -------------------------------------------------------------------------------------------------

LEARN = [
    "--max_steps=40",
    "--learning_rate=1e-2",
    "--per_device_train_batch_size=8",
    "--sam_rho=0.01",
    "--save_steps=20",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_to_text) -> Path:
    """A run that learns which sentences are good."""
    folder = tmp_path_factory.mktemp("run")
    rows = {"text": SENTENCES * 4, "label": ["yes" if i % 2 else "no" for i in range(32)]}
    run(rows, text_to_text, folder, *LEARN, "--evaluate_train", "--save_strategy=steps", "--logging_steps=10")
    return folder


def test_it_learns_to_write_the_words(finished):
    record = read_record(finished / "out/run_record.json")
    assert record.metrics["accuracy"] > 0.6
    assert record.metrics["no_class"] == 0
    assert record.metrics["train_accuracy"] > 0.6
    assert set(record.metrics) - {"tokens"} - {name for name in record.metrics if name.startswith("train_")} == set(
        seq2seq.EVALUATION["classification"]
    )
    assert set(seq2seq.EVALUATION["classification"]) <= set(seq2seq.METRICS)


def test_kept_predictions_give_the_metrics_and_what_a_search_for_rho_compares(finished):
    kept = pd.read_parquet(finished / "out/test_predictions.parquet")
    results = json.loads((finished / "out/all_results.json").read_text())
    assert (kept["target"] == kept["generated"]).mean() == results["test_accuracy"] == kept["correct"].mean()
    assert kept["nll"].sum() / kept["tokens"].sum() == pytest.approx(results["test_nll_per_token"])
    assert set(kept["tokens"]) == {2}, "a word and its end"
    scores = example_scores(kept)
    assert list(scores) == ["accuracy", "nll_per_token"]
    assert scores["accuracy"].value == results["test_accuracy"]
    assert constant_scores(kept)["accuracy"].value == 0.5


def test_the_card_says_how_to_load_it_and_that_is_right(finished):
    card = ModelCard.load(finished / "out/README.md")
    assert card.data.pipeline_tag == "text2text-generation"
    code = card.text.split("```python\n")[1].split("```")[0].replace('"out"', f'"{finished / "out"}"')
    names: dict = {}
    exec(code, names)
    tokenizer = names["tokenizer"]
    written = names["model"].generate(**tokenizer("so good", return_tensors="pt", return_token_type_ids=False))
    assert tokenizer.decode(written[0], skip_special_tokens=True) in ("no", "yes")


def test_sharpness_is_of_the_mean_over_target_tokens(finished, tmp_path):
    words = ["--checkpoints", str(finished / "out"), "--measures=sam", "--disable_tqdm=true", "--num_examples=10"]
    found = sharpness.main([*words, f"--output_dir={tmp_path}", "--split=test", "--batch_size=3"])
    kept = pd.read_parquet(finished / "out/test_predictions.parquet")
    assert len(kept) == 8
    assert found["subset"]["labels"] == kept["tokens"].sum()
    scalars = found["checkpoints"]["out"]["scalars"]
    assert scalars["loss"] == pytest.approx(kept["nll"].sum() / kept["tokens"].sum(), rel=1e-5)
    assert scalars["sam_0.05"] > 0


def test_the_report_on_checkpoints_is_by_the_likelihood_of_targets(finished, tmp_path):
    out = str(finished / "out")
    report.main([f"a={out}", f"b={out}", f"--output_dir={tmp_path}", "--disable_tqdm=true"])
    results = json.loads((finished / "out/all_results.json").read_text())
    text = (tmp_path / "report.md").read_text()
    assert f"{results['test_perplexity']:.3f}" in text
    assert "nats per token" in text


def test_killed_and_resumed_is_the_uninterrupted_run(finished, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(finished / "data.parquet", tmp_path / "data.parquet")
    shutil.copytree(finished / "out/checkpoint-20", tmp_path / "out/checkpoint-20")
    argv = json.loads((finished / "out/run_record.json").read_text())["config"]["recipe"]["model"]["model_name_or_path"]
    words = [f"--dataset={finished / 'data.parquet'}", f"--model_name_or_path={argv}", *QUIET, *LEARN]
    words += ["--evaluate_train", "--save_strategy=steps", "--logging_steps=10", "--resume_from_checkpoint=auto"]
    seq2seq.main([*words, f"--output_dir={tmp_path / 'out'}"])
    before, after = weights(finished / "out"), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    frames = (pd.read_parquet(folder / "out/test_predictions.parquet") for folder in (finished, tmp_path))
    pd.testing.assert_frame_equal(*frames)


def test_without_generation_the_likelihood_alone_is_measured(text_to_text, tmp_path):
    run(PAIRS, text_to_text, tmp_path, "--predict_with_generate=false")
    record = read_record(tmp_path / "out/run_record.json")
    assert set(record.metrics) == {"loss", "perplexity", "nll_per_token", "tokens"}
    kept = pd.read_parquet(tmp_path / "out/test_predictions.parquet")
    assert list(example_scores(kept)) == ["nll_per_token"]
    assert constant_scores(kept) == {}


def test_evaluation_during_training_generates_and_a_text_has_all_metrics(text_to_text, tmp_path):
    trainer = run(PAIRS, text_to_text, tmp_path, "--validation_size=0.25", "--eval_strategy=steps", "--eval_steps=1")
    assert len(logged(trainer, "eval_chrf")) == 2
    assert set(seq2seq.EVALUATION["text"]) <= set(read_record(tmp_path / "out/run_record.json").metrics)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
def test_adapters(text_to_text, tmp_path):
    trainer = run(PAIRS, text_to_text, tmp_path, "--lora_r=2", "--lora_target_modules", "q", "v")
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_a_model_from_scratch_has_the_tokenizers_words_and_as_many_layers_on_both_sides(text_to_text, tmp_path):
    Dataset.from_dict(PAIRS).to_parquet(tmp_path / "data.parquet")
    size = '{"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}'
    words = [f"--dataset={tmp_path / 'data.parquet'}", "--model_type=t5", f"--tokenizer_name={text_to_text}", *QUIET]
    words += [f"--config_overrides={size}", "--max_steps=1", f"--output_dir={tmp_path / 'out'}", "--save_strategy=no"]
    config = seq2seq.main(words).model.config
    assert config.vocab_size == len(AutoTokenizer.from_pretrained(text_to_text))
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (0, 1, 0)
    assert config.num_decoder_layers == config.num_layers == 1
