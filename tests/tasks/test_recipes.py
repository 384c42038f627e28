"""The recipes from their command line to what they leave behind."""

from __future__ import annotations

import gc
import json
import re
import shutil
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import stand_ins
import torch
from conftest import SENTENCES
from datasets import Dataset
from filelock import FileLock, Timeout
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import Trainer, pipeline

from hf_sam.experiments.records import RunFinishedError, read_record
from hf_sam.tasks import causal_lm, image_classification, output_folder, text_classification
from hf_sam.tasks.command_line.errors import UserError, run
from hf_sam.tasks.command_line.options import ModelArguments
from hf_sam.tasks.models import load_config

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT reads it
COMMON = ["--use_cpu=true", "--disable_tqdm=true", "--per_device_train_batch_size=4", "--logging_steps=2", "--seed=1"]
VIT = '{"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}'

NO_DROPOUT = '{"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}'


def images(data: Path, out: Path, *words: str):
    argv = [f"--dataset={data}", "--model_type=vit", f"--config_overrides={VIT}", "--augmentation=crop", *COMMON]
    return image_classification.main([*argv, f"--output_dir={out}", *words])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def final_numbers(folder: Path) -> tuple[dict, list]:
    """Metrics of both splits, and the loss of every logged step."""
    results = json.loads((folder / "all_results.json").read_text())
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    timing = ("runtime", "per_second", "time")
    kept = {k: v for k, v in results.items() if k.startswith(("test", "train_split")) and not k.endswith(timing)}
    return kept, [entry["loss"] for entry in history if "loss" in entry]


def same(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    stand_ins.write("images", folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data) -> Path:
    """A run of six steps in two epochs, a checkpoint after every second one."""
    out = tmp_path_factory.mktemp("run") / "digits_sam"
    images(
        data, out, "--num_train_epochs=2", "--save_steps=2", "--sam_rho=0.1", "--label_noise=0.25", "--evaluate_train"
    )
    return out


# --- what a run leaves behind --------------------------------------------------------------------------------------


def test_results_are_where_people_look(finished):
    results = json.loads((finished / "all_results.json").read_text())
    assert {"train_loss", "sam_passes", "test_accuracy", "test_f1_macro", "test_mcc", "test_nll", "test_ece"} <= set(
        results
    )
    assert "train_split_accuracy" in results
    history = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    assert any("test_accuracy" in entry for entry in history)
    assert any("sam_perturbed_loss" in entry for entry in history)


def test_kept_predictions_give_the_metrics(finished):
    frame = pd.read_parquet(finished / "test_predictions.parquet")
    results = json.loads((finished / "test_results.json").read_text())
    probabilities = np.stack(frame["probabilities"])
    assert list(frame["index"]) == list(range(stand_ins.ROWS))
    assert (frame["label"] == frame["prediction"]).mean() == pytest.approx(results["test_accuracy"])
    assert -np.log(probabilities[np.arange(12), frame["label"]]).mean() == pytest.approx(results["test_nll"], rel=1e-6)


def test_record_says_what_was_run(finished):
    record = read_record(finished / "run_record.json")
    assert (record.status, record.condition, record.steps, record.seed) == ("finished", "noise 0.25", 6, 1)
    assert record.config["recipe"]["data"]["label_noise"] == 0.25
    assert record.config["sam"]["rho"] == 0.1
    assert record.data["train"]["examples"] == 12
    assert record.data["train"]["fingerprint"]
    assert {"accuracy", "nll", "train_accuracy"} <= set(record.metrics)
    assert record.predictions == "test_predictions.parquet"


def test_fine_tuned_folder_loads_in_a_pipeline(finished):
    predict = pipeline("image-classification", model=str(finished), device="cpu")
    frame = pd.read_parquet(finished / "test_predictions.parquet")
    for i in range(3):
        scores = {entry["label"]: entry["score"] for entry in predict(stand_ins.image(i))}
        assert [scores["no"], scores["yes"]] == pytest.approx(frame["probabilities"][i].tolist(), abs=1e-4)


def test_card_is_written(finished):
    card = ModelCard.load(finished / "README.md")
    assert "sharpness-aware-minimization" in card.data.tags
    assert "sam" not in card.data.tags
    assert card.data.eval_results[0].task_type == "image-classification"
    assert card.data.eval_results[0].dataset_name.startswith("images")
    assert "/images" not in card.content.replace(str(finished), "")


def test_pushing_to_the_hub_takes_the_whole_card_along(data, tmp_path, monkeypatch):
    pushed = {}

    class Hub:
        def create_repo(self, name, **kwargs):
            return types.SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, folder_path, repo_id, **kwargs):
            pushed[repo_id] = ModelCard.load(Path(folder_path) / "README.md")

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    images(data, tmp_path / "cells", "--max_steps=1", "--save_strategy=no", "--push_to_hub", "--hub_model_id=cells")
    (card,) = pushed.values()
    assert "sharpness-aware-minimization" in card.data.tags
    assert {result.metric_type for result in card.data.eval_results} >= {"accuracy", "f1", "ece"}
    assert 'model="me/cells"' in card.text


# --- the same run, whatever happens to it --------------------------------------------------------------------------


def test_killed_while_saving_and_resumed_is_the_uninterrupted_run(finished, data, tmp_path):
    """What `kill -9` leaves: whole checkpoints, and the beginning of one. Step 4 is in the middle of the second epoch."""
    out = tmp_path / "digits_sam"
    out.mkdir()
    for step in (4, 6):
        shutil.copytree(finished / f"checkpoint-{step}", out / f"checkpoint-{step}")
    (out / "checkpoint-6/trainer_state.json").unlink()
    words = ["--num_train_epochs=2", "--save_steps=2", "--sam_rho=0.1", "--label_noise=0.25", "--evaluate_train"]
    trainer = images(data, out, *words, "--resume_from_checkpoint=auto")
    assert trainer.state.global_step == 6
    assert same(out, finished)
    first, second = (pd.read_parquet(folder / "test_predictions.parquet") for folder in (out, finished))
    pd.testing.assert_frame_equal(first, second)
    assert final_numbers(out) == final_numbers(finished)
    record, expected = (read_record(folder / "run_record.json") for folder in (out, finished))
    assert (record.resumed_from, record.passes, record.has_whole_costs) == (4, expected.passes, True)
    (first, second) = record.segments
    assert record.seconds == pytest.approx(first["seconds"] + second["seconds"])
    results = [json.loads((folder / "all_results.json").read_text()) for folder in (out, finished)]
    assert results[0]["train_loss"] == pytest.approx(results[1]["train_loss"], rel=1e-5)
    assert results[0]["train_runtime"] == pytest.approx(record.seconds, abs=1e-3)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_with_a_file_that_is_cut_off_is_passed_over(finished, data, tmp_path, name, caplog):
    out = tmp_path / "digits_sam"
    for step in (2, 4):
        shutil.copytree(finished / f"checkpoint-{step}", out / f"checkpoint-{step}")
    file = out / f"checkpoint-4/{name}"
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    trainer = images(data, out, *SAME, "--resume_from_checkpoint=auto")
    assert trainer.args.resume_from_checkpoint.endswith("checkpoint-2")
    assert f"checkpoint-4 is incomplete ({name} missing or incomplete); trying the checkpoint before it" in caplog.text
    assert same(out, finished)
    with pytest.raises(UserError, match=f"is not a complete checkpoint: {name} missing or incomplete"):
        file = out / "checkpoint-2" / name
        file.write_bytes(file.read_bytes()[:100])
        images(data, tmp_path / "other", *SAME, f"--resume_from_checkpoint={out}/checkpoint-2")


SAME = ["--num_train_epochs=2", "--save_steps=2", "--sam_rho=0.1", "--label_noise=0.25", "--evaluate_train"]


def test_a_finished_run_is_not_made_again_by_the_same_command(finished, data):
    before = (finished / "run_record.json").read_bytes()
    with pytest.raises(RunFinishedError, match=r"finished after 6 steps. Nothing to do"):
        images(data, finished, *SAME, "--resume_from_checkpoint=auto")
    with pytest.raises(UserError, match="already contains checkpoint-6"):
        images(data, finished, *SAME)
    assert (finished / "run_record.json").read_bytes() == before


def test_a_run_killed_after_its_last_step_is_evaluated_and_has_the_costs_of_its_steps(finished, data, tmp_path):
    out = tmp_path / "digits_sam"
    shutil.copytree(finished / "checkpoint-6", out / "checkpoint-6")
    before = read_record(finished / "run_record.json")
    images(data, out, *SAME, "--resume_from_checkpoint=auto")
    record = read_record(out / "run_record.json")
    assert (record.status, record.resumed_from, record.steps, record.passes) == ("finished", 6, 6, 12)
    assert record.seconds == pytest.approx(before.seconds, rel=0.5)
    assert record.metrics == before.metrics
    results = [json.loads((folder / "all_results.json").read_text()) for folder in (out, finished)]
    assert results[0]["train_loss"] == pytest.approx(results[1]["train_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--learning_rate=0.5", "learning_rate was 5e-05 and is now 0.5"),
        ("--per_device_train_batch_size=2", "per_device_train_batch_size was 4 and is now 2"),
        ("--label_noise=0.5", "label_noise was 0.25 and is now 0.5"),
        ("--num_train_epochs=3", "num_train_epochs was 2.* and is now 3"),
        ("--augmentation=none", "augmentation was crop and is now none"),
        ("--sam_rho=0.2", "sam_rho was 0.1 and is now 0.2"),
    ],
)
def test_going_on_with_other_arguments_is_refused(finished, data, tmp_path, word, message):
    out = tmp_path / "digits_sam"
    shutil.copytree(finished / "checkpoint-4", out / "checkpoint-4")
    record = read_record(finished / "run_record.json")
    record.status = "running"
    record.write(out / "run_record.json")
    with pytest.raises(
        ValueError, match=f"checkpoint-4 was made with different arguments: .*{message}.*Resume with the old values"
    ):
        images(data, out, *SAME, word, "--resume_from_checkpoint=auto")


def test_a_finished_run_without_checkpoints_is_not_written_over_either(data, tmp_path):
    images(data, tmp_path / "out", "--max_steps=1", "--save_strategy=no")
    with pytest.raises(UserError, match=r"contains a finished run; start over with --overwrite_output_dir true"):
        images(data, tmp_path / "out", "--max_steps=1", "--save_strategy=no")
    images(data, tmp_path / "out", "--max_steps=2", "--save_strategy=no", "--overwrite_output_dir=true")
    assert read_record(tmp_path / "out/run_record.json").steps == 2


def test_passes_of_a_run_that_perturbs_late_are_counted_by_step(data, tmp_path):
    """Plain to step 3 of 6, two passes after: killed at 4, the rest alone would say two for every step."""
    words = ["--max_steps=6", "--save_steps=4", "--sam_method=late", "--sam_rho=0.1", "--sam_start=0.5"]
    images(data, tmp_path / "out", *words)
    record = read_record(tmp_path / "out/run_record.json")
    assert record.passes == 9
    record.status = "running"
    record.write()
    shutil.rmtree(tmp_path / "out/checkpoint-6")
    images(data, tmp_path / "out", *words, "--resume_from_checkpoint=auto")
    again = read_record(tmp_path / "out/run_record.json")
    assert [part["passes"] for part in again.segments] == [5, 4]
    assert again.passes == 9


def test_two_runs_in_one_folder_are_one_too_many(data, tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder, "LOCK_SECONDS", 0.0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/_run.owner").write_text("process 7 on node-3, since yesterday\n")
    with FileLock(tmp_path / "out" / output_folder.LOCK_NAME):
        with pytest.raises(UserError, match=r"is in use by process 7 on node-3, since yesterday\. Wait"):
            images(data, tmp_path / "out", "--max_steps=1")
        assert not (tmp_path / "out/run_record.json").exists()
    images(data, tmp_path / "out", "--max_steps=1", "--save_strategy=no")  # what a dead run leaves is no lock
    gc.collect()
    with pytest.raises(Timeout):  # this process has it until it ends
        FileLock(tmp_path / "out" / output_folder.LOCK_NAME).acquire(timeout=0)


def test_ctrl_c_leaves_an_interrupted_record_and_says_how_to_go_on(data, tmp_path, monkeypatch, capsys):
    step = image_classification.SAMTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(image_classification.SAMTrainer, "training_step", interrupted)
    for words, hint in ((["--save_steps=2"], "continues from .*checkpoint-2"), (["--save_strategy=no"], "starts over")):
        out = tmp_path / words[0].strip("-")
        with pytest.raises(SystemExit) as ended:
            run(lambda out=out, words=words: images(data, out, "--max_steps=4", *words))
        assert ended.value.code == 130
        printed = capsys.readouterr().err
        assert re.search(f"Interrupted at step 3 of 4. .*{hint}", printed)
        assert "Traceback" not in printed
        record = read_record(out / "run_record.json")
        assert (record.status, record.steps) == ("interrupted", 3)


def test_every_epoch_draws_other_crops(data, tmp_path, monkeypatch):
    drawn = []
    original = image_classification.ImageDataset._pixels
    monkeypatch.setattr(
        image_classification.ImageDataset,
        "_pixels",
        lambda self, index: drawn.append((self.split, int(self.epoch))) or original(self, index),
    )
    images(data, tmp_path / "out", "--num_train_epochs=3", "--save_strategy=no")
    assert [drawn.count(("train", epoch)) for epoch in range(4)] == [12, 12, 12, 0]


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_accumulated_batches_are_the_one_batch(kind, data, encoder, tmp_path):
    """Under SGD, where a gradient that is k times too large would show."""
    losses, folders = [], []
    for size, count in ((4, 1), (2, 2)):
        out = tmp_path / f"{size}x{count}"
        out.mkdir()
        words = ["--optim=sgd", "--max_grad_norm=0", "--learning_rate=0.5", "--sam_rho=0.05", "--logging_steps=1"]
        words += [f"--per_device_train_batch_size={size}", f"--gradient_accumulation_steps={count}", "--max_steps=2"]
        if kind == "images":
            trainer = images(data, out, *words, "--save_strategy=no")
            folders.append(out)
        else:
            words.append(f"--config_overrides={NO_DROPOUT}")
            trainer = texts({"text": SENTENCES * 2, "label": [0, 1] * 8}, encoder, out, *words)
            folders.append(out / "out")
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    first, second = map(weights, folders)
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_auto_starts_anew_where_there_is_nothing(data, tmp_path):
    assert images(data, tmp_path / "new", "--max_steps=1", "--resume_from_checkpoint=auto").state.global_step == 1


def test_overwriting_removes_old_checkpoints(finished, data, tmp_path):
    out = tmp_path / "digits_sam"
    shutil.copytree(finished, out)
    images(data, out, "--max_steps=1", "--overwrite_output_dir", "--save_strategy=no")
    assert not list(out.glob("checkpoint-*"))


def test_arms_of_a_seed_start_from_the_same_head_and_data(data, tmp_path):
    """One changed word is the only difference between baseline and SAM: before the first step they are the same."""
    arms = {"adamw": ["--sam_rho=0"], "sam": ["--sam_rho=0.05"], "sgd": ["--sam_rho=0", "--optim=sgd"]}
    records, losses = {}, {}
    for name, words in arms.items():
        trainer = images(data, tmp_path / name, *words, "--max_steps=1", "--logging_steps=1", "--label_noise=0.25")
        records[name] = read_record(tmp_path / name / "run_record.json")
        losses[name] = trainer.state.log_history[0]["loss"]
    assert len({record.model["fingerprint"] for record in records.values()}) == 1
    assert len({record.data["train"]["fingerprint"] for record in records.values()}) == 1
    assert len(set(losses.values())) == 1
    assert {record.arm for record in records.values()} == {"adamw_torch_fused", "sam (adamw_torch_fused)", "sgd"}


def test_streamed_images(data, tmp_path):
    words = ["--streaming=true", "--max_steps=2", "--class_names", "no", "yes"]
    trainer = images(data, tmp_path / "out", *words)
    assert len(pd.read_parquet(tmp_path / "out/test_predictions.parquet")) == stand_ins.ROWS
    assert trainer.state.global_step == 2


# --- texts ---------------------------------------------------------------------------------------------------------


def texts(rows: dict, encoder: str, tmp_path: Path, *words: str):
    Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    argv = [f"--dataset={tmp_path / 'data.parquet'}", f"--model_name_or_path={encoder}", *COMMON, "--max_steps=2"]
    return text_classification.main([*argv, f"--output_dir={tmp_path / 'out'}", "--save_strategy=no", *words])


def test_text_pairs(encoder, tmp_path):
    rows = {"text": SENTENCES * 2, "other": SENTENCES[::-1] * 2, "label": ["same", "different"] * 8}
    trainer = texts(
        rows, encoder, tmp_path, "--text_pair_column=other", "--validation_size=0.25", "--eval_strategy=epoch"
    )
    first = trainer.train_dataset[0]
    assert trainer.processing_class.decode(first["input_ids"]).count(" ") >= 3
    assert any("eval_accuracy" in entry for entry in trainer.state.log_history)
    predict = pipeline("text-classification", model=str(tmp_path / "out"), device="cpu")
    assert predict({"text": "a fine film", "text_pair": "no fun"})["label"] in ("same", "different")


def test_the_card_of_a_model_from_a_folder_names_it_and_no_path_of_this_machine(encoder, tmp_path):
    rows = {"text": SENTENCES * 2, "label": [0, 1] * 8}
    words = ["--validation_size=0.25", "--eval_strategy=steps", "--eval_steps=1", "--logging_steps=1"]
    texts(rows, encoder, tmp_path, *words)
    text = (tmp_path / "out/README.md").read_text()
    assert f"A model fine-tuned from `{Path(encoder).name}` on data.parquet." in text
    assert "from scratch" not in text
    assert "| step | training loss | sam sharpness | validation loss |" in text
    assert str(tmp_path) not in text
    assert encoder not in text
    assert "(https://huggingface.co/)" not in text


@pytest.mark.parametrize(("words", "is_said"), [([], True), (["--sam_rho=0.1"], False)], ids=["default", "chosen"])
def test_fine_tuning_with_a_rho_from_training_from_scratch_is_pointed_out(encoder, tmp_path, capsys, words, is_said):
    texts({"text": SENTENCES * 2, "label": [0, 1] * 8}, encoder, tmp_path, "--sam_method=asam", *words)
    assert ("note: rho 0.5 is from the paper of asam" in capsys.readouterr().out) == is_said


def test_several_labels_each(encoder, tmp_path):
    rows = {"text": SENTENCES * 2, "label": [["a"], ["a", "b"], [], ["b"]] * 4}
    trainer = texts(rows, encoder, tmp_path)
    assert trainer.model.config.problem_type == "multi_label_classification"
    assert "test_subset_accuracy" in json.loads((tmp_path / "out/all_results.json").read_text())
    assert len(pd.read_parquet(tmp_path / "out/test_predictions.parquet")["probabilities"][0]) == 2


def test_regression(encoder, tmp_path):
    rows = {"text": SENTENCES * 2, "score": [i / 16 for i in range(16)]}
    trainer = texts(rows, encoder, tmp_path, "--label_column=score")
    assert trainer.model.config.problem_type == "regression"
    assert trainer.model.config.num_labels == 1
    assert "test_pearson" in json.loads((tmp_path / "out/all_results.json").read_text())


def test_text_classifier_with_lora(encoder, tmp_path):
    rows = {"text": SENTENCES * 2, "label": [0, 1] * 8}
    trainer = texts(rows, encoder, tmp_path, "--lora_r=2", "--lora_target_modules", "query", "value")
    trainable = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert any("lora_A" in name for name in trainable)
    assert any("classifier" in name for name in trainable)
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


# --- language models -----------------------------------------------------------------------------------------------


def language(rows: dict, decoder: str, tmp_path: Path, *words: str):
    Dataset.from_dict(rows).to_parquet(tmp_path / "data.parquet")
    argv = [f"--dataset={tmp_path / 'data.parquet'}", *COMMON, "--max_steps=2"]
    if not any(word.startswith("--model_type") for word in words):
        argv.append(f"--model_name_or_path={decoder}")
    argv += ["--bf16=false", "--activation_checkpointing=false", "--max_length=32", "--save_strategy=no"]
    return causal_lm.main([*argv, f"--output_dir={tmp_path / 'out'}", *words])


def results(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out/all_results.json").read_text())


def test_both_trainers_measure_the_same_perplexity(decoder, tmp_path):
    """Before the first step the model is the same, and so is what is measured of it."""
    perplexities = {}
    for name in ("plain", "sft"):
        (tmp_path / name).mkdir()
        language({"text": SENTENCES * 2}, decoder, tmp_path / name, f"--trainer={name}", "--learning_rate=1e-30")
        perplexities[name] = results(tmp_path / name)["test_perplexity"]
    assert perplexities["plain"] == pytest.approx(perplexities["sft"], rel=1e-5)
    record = read_record(
        tmp_path / "plain" / "out" / "run_record.json"
    )  # it can be read back, losses per token and all
    assert record.metrics["perplexity"] == perplexities["plain"]


@pytest.mark.parametrize("words", [["--trainer=plain"], ["--trainer=sft"], ["--lora_r=2"]], ids=lambda words: words[0])
def test_the_card_of_a_language_model_is_one_card_of_this_model(decoder, tmp_path, words):
    language({"text": SENTENCES * 2}, decoder, tmp_path, *words)
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.text.strip().splitlines()[0] == "# out"
    kind = "LoRA adapter" if "--lora_r=2" in words else "model"
    assert f"A {kind} fine-tuned from `{Path(decoder).name}` on data.parquet." in card.text
    assert card.data.pipeline_tag == "text-generation"
    assert {result.metric_type for result in card.data.eval_results} >= {"perplexity"}
    assert "None" not in card.content
    assert "TRL" not in card.text
    assert str(tmp_path) not in card.content
    assert decoder not in card.content


def test_completions_alone_are_learnt(decoder, tokenizer, tmp_path):
    rows = {"prompt": ["what a film"] * 16, "completion": [" so good"] * 16}
    trainer = language(rows, decoder, tmp_path, "--completion_only_loss=true")
    batch = trainer.data_collator([trainer.train_dataset[0]])
    learnt = batch["labels"][batch["labels"] != -100]
    assert tokenizer.decode(learnt) == "so good[EOS]" or tokenizer.decode(learnt).split() == ["so", "good", "[EOS]"]
    assert results(tmp_path)["test_tokens"] == 4 * 3


def test_packed_conversations_with_lora(decoder, tmp_path):
    turns = [{"role": "user", "content": "what film"}, {"role": "assistant", "content": "so good"}]
    trainer = language(
        {"messages": [turns] * 16}, decoder, tmp_path, "--packing=true", "--assistant_only_loss=true", "--lora_r=2"
    )
    assert len(trainer.train_dataset) < 12
    assert results(tmp_path)["test_tokens"] == 4 * 3
    generate = pipeline("text-generation", model=str(tmp_path / "out"), device="cpu")
    text = generate("a fine", max_new_tokens=2, do_sample=False)[0]["generated_text"]
    assert text.startswith("a fine")


def test_language_model_from_scratch(tmp_path, decoder):
    small = '{"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 64}'
    trainer = language(
        {"text": SENTENCES * 2},
        decoder,
        tmp_path,
        "--trainer=plain",
        "--model_type=gpt2",
        f"--tokenizer_name={decoder}",
        f"--config_overrides={small}",
    )
    assert isinstance(trainer, Trainer)
    assert trainer.model.config.vocab_size == len(trainer.processing_class)


def test_fields_of_a_configuration_that_derive_from_overridden_ones_follow_them():
    def config(model_type, **overrides):
        return load_config(ModelArguments(model_type=model_type, config_overrides=overrides))

    assert config("llama", hidden_size=64, num_attention_heads=4).head_dim == 16
    assert config("llama", num_attention_heads=4).num_key_value_heads == 4
    assert len(config("qwen3", num_hidden_layers=2).layer_types) == 2
    assert config("gpt2", hidden_size=8).n_embd == 8
    with pytest.raises(UserError, match=r"config_overrides: .*'hidden_size'.*expected int, got str"):
        config("llama", hidden_size="wide")


FROM_BYTES = ["--trainer=plain", "--tokenizer_name=bytes", "--model_type=gpt2", "--packing=true"]
FROM_BYTES += ['--config_overrides={"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 64}']


def test_the_plain_trainer_packs_training_texts_and_loses_none_of_their_bytes(decoder, tmp_path):
    texts = [f"text {i} has some bytes" for i in range(16)]
    trainer = language({"text": texts}, decoder, tmp_path, *FROM_BYTES)
    rows = trainer.train_dataset["input_ids"]
    assert {len(row) for row in rows} == {32}
    assert rows == trainer.train_dataset["labels"]
    decoded = trainer.processing_class.decode([token for row in rows for token in row])
    whole = decoded.split("</s>")[:-1]
    assert len(whole) >= 8
    assert set(whole) <= set(texts)  # each text once, one end of text after it
    assert len(set(whole)) == len(whole)
    assert 4 * 21 <= results(tmp_path)["test_tokens"] <= 4 * 22  # of each test text on its own, its end included


def test_texts_too_short_for_one_packed_row_are_refused(decoder, tmp_path):
    with pytest.raises(UserError, match=r"packing: the training texts are shorter than max_length=32"):
        language({"text": ["a"] * 12}, decoder, tmp_path, *FROM_BYTES, "--test_size=0.75")
