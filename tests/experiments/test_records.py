import json
from importlib.metadata import version

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from hf_sam.experiments.costs import COSTS_NAME
from hf_sam.experiments.json_files import plain
from hf_sam.experiments.provenance import describe_environment, describe_model, fingerprint_data, fingerprint_model
from hf_sam.experiments.records import (
    OPEN,
    RECORD_NAME,
    RecordError,
    RunFinishedError,
    RunRecord,
    find_records,
    read_record,
    recording,
)
from hf_sam.experiments.same_run import changed_arguments
from hf_sam.reporting.results import value_of


def test_a_finished_run_leaves_what_it_was_and_what_it_cost(make_trainer, tmp_path):
    trainer = make_trainer(seed=3, hub_token="hf_abcdefghijklmnopqrstuvwx")
    untrained = fingerprint_model(trainer.model)
    path = tmp_path / RECORD_NAME
    with recording(path, trainer, recipe={"rho": 0.1}, task="toy", arm="adamw") as record:
        assert read_record(path).status == "running"
        trainer.train()
        record.metrics = {"accuracy": 0.75}
    record = read_record(path)
    assert (record.status, record.task, record.arm, record.seed) == ("finished", "toy", "adamw", 3)
    assert (record.steps, record.passes, record.metrics) == (4, 4.0, {"accuracy": 0.75})
    assert record.seconds > 0
    assert record.samples_per_second > 0
    assert record.peak_memory > 2**20
    assert [entry["step"] for entry in record.curves if "loss" in entry] == [1, 2, 3, 4]
    assert record.model["fingerprint"] == untrained != fingerprint_model(trainer.model)
    assert record.model["parameters"] == 15
    assert record.data["train"]["examples"] == 32
    assert record.config["recipe"] == {"rho": 0.1}
    assert record.config["training_arguments"]["max_steps"] == 4
    assert record.config["sam"] is None
    assert record.environment["packages"]["torch"] == version("torch")
    assert "hf_abcdef" not in path.read_text()
    assert record.started <= record.ended


def test_a_failed_run_keeps_its_error_and_raises_it_on(make_trainer, tmp_path):
    trainer = make_trainer()
    path = tmp_path / RECORD_NAME
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        recording(path, trainer, task="toy", arm="sam"),
    ):
        raise RuntimeError("out of memory, said hf_abcdefghijklmnopqrstuvwx")
    record = read_record(path)
    assert record.status == "failed"
    assert record.error["type"] == "RuntimeError"
    assert record.error["message"] == "out of memory, said <TOKEN>"
    assert "test_records.py" in record.error["traceback"]


def test_an_interrupted_run_says_so_and_is_one_to_be_resumed(make_trainer, tmp_path):
    path = tmp_path / RECORD_NAME
    with pytest.raises(KeyboardInterrupt), recording(path, make_trainer(), task="toy", arm="sam"):
        raise KeyboardInterrupt
    assert read_record(path).status == "interrupted"
    assert "interrupted" in OPEN


class Killed(BaseException):
    """Ends a run the way a signal does: nobody gets to write anything."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def test_seconds_passes_and_losses_add_up_over_a_kill(make_trainer, tmp_path):
    """Logged every third step, saved every second, killed after the fifth: steps 1 to 4 count once, and 5 again."""
    path, words = tmp_path / "run" / RECORD_NAME, {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    whole = make_trainer(output_dir=tmp_path / "whole", logging_steps=3, **words)
    with recording(tmp_path / "whole" / RECORD_NAME, whole, task="toy", arm="adamw"):
        whole.train()
    trainer = make_trainer(logging_steps=3, **words)
    trainer.add_callback(KillAt(5))
    with pytest.raises(Killed), recording(path, trainer, task="toy", arm="adamw"):
        trainer.train()
    assert read_record(path).status == "running"
    costs = tmp_path / "run/checkpoint-4" / COSTS_NAME
    (segment,) = json.loads(costs.read_text())
    assert (segment["begin"], segment["end"], segment["passes"], segment["loss_steps"]) == (0, 4, 4, 4)
    costs.write_text(json.dumps([{**segment, "seconds": 100.0}]))

    again = make_trainer(logging_steps=3, resume_from_checkpoint=str(costs.parent), **words)
    with recording(path, again, task="toy", arm="adamw"):
        again.train(resume_from_checkpoint=str(costs.parent))
    record = read_record(path)
    assert (record.status, record.resumed_from, record.steps, record.passes) == ("finished", 4, 6, 6)
    assert [(part["begin"], part["end"]) for part in record.segments] == [(0, 4), (4, 6)]
    assert 100 < record.seconds < 110
    assert record.has_whole_costs
    last, expected = record.curves[-1], whole.state.log_history[-1]
    assert last["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-6)
    assert last["train_runtime"] == pytest.approx(record.seconds, abs=1e-3)
    assert record.samples_per_second == pytest.approx(6 * 8 / record.seconds, rel=1e-2)


def test_what_the_steps_before_a_checkpoint_took_may_be_unknown_and_then_nothing_is_timed(make_trainer, tmp_path):
    words = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(**words).train()  # keeps no record
    checkpoint = str(tmp_path / "run/checkpoint-2")
    trainer = make_trainer(resume_from_checkpoint=checkpoint, **words)
    with recording(tmp_path / RECORD_NAME, trainer, task="toy", arm="adamw") as record:
        trainer.train(resume_from_checkpoint=checkpoint)
    assert (record.resumed_from, record.passes, record.has_whole_costs) == (2, 2, False)
    assert value_of(record, "seconds") is value_of(record, "passes") is None
    assert value_of(record, "steps") == 4


def test_a_finished_record_is_never_written_over(make_trainer, tmp_path):
    path = tmp_path / RECORD_NAME
    trainer = make_trainer()
    with recording(path, trainer, recipe={"data": {"label_noise": 0.0}}, task="toy", arm="adamw"):
        trainer.train()
    before = path.read_bytes()
    with (
        pytest.raises(RunFinishedError, match=r"finished after 4 steps. Nothing to do"),
        recording(path, make_trainer(), recipe={"data": {"label_noise": 0.0}}, task="toy", arm="adamw"),
    ):
        pytest.fail("the block must not be entered")
    for words, recipe, message in (
        ({"learning_rate": 0.5}, 0.0, r"learning_rate was 5e-05 and is now 0\.5"),
        ({"per_device_train_batch_size": 4}, 0.0, r"per_device_train_batch_size was 8 and is now 4"),
        ({}, 0.2, r"label_noise was 0\.0 and is now 0\.2"),
    ):
        with (
            pytest.raises(ValueError, match=f"finished run with different arguments: .*{message}.*Choose another"),
            recording(path, make_trainer(**words), recipe={"data": {"label_noise": recipe}}, task="toy", arm="adamw"),
        ):
            pytest.fail("the block must not be entered")
    assert path.read_bytes() == before


def test_the_same_batch_in_other_parts_is_the_same_run():
    def run(size, accumulation, processes):
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        environment = {"hardware": {"processes": processes}}
        return RunRecord(task="t", arm="a", config={"training_arguments": arguments}, environment=environment)

    assert changed_arguments(run(8, 1, 2), run(4, 4, 1)) == []
    assert changed_arguments(run(8, 1, 2), run(8, 1, 1)) == ["examples a step was 16 and is now 8"]


def test_written_and_read_records_are_equal_and_strict_json(tmp_path):
    record = RunRecord(task="t", arm="a", seed=1, metrics={"nll": float("nan"), "accuracy": 0.5}, status="finished")
    path = record.write(tmp_path / "deep" / RECORD_NAME)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    again = read_record(path)
    assert again.metrics == {"nll": None, "accuracy": 0.5}
    again.metrics["nll"] = record.metrics["nll"]
    assert again == record
    assert [entry.name for entry in path.parent.iterdir()] == [RECORD_NAME]  # no temporary file left


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "may be truncated. Delete it to run it again"),
        ('{"format": "hf_sam.run_record", "ver', "may be truncated"),
        ("[]", "is not a run record of hf_sam"),
        ('{"loss": 1}', "is not a run record of hf_sam"),
        ('{"format": "hf_sam.run_record", "version": 0}', "has format version 0; this hf_sam reads version 1. Run"),
        ('{"format": "hf_sam.run_record", "version": 9}', "version 9; .* Upgrade hf_sam"),
        ('{"format": "hf_sam.run_record", "version": 1, "task": "t", "arm": "a"}', "'status' is missing"),
        (
            '{"format": "hf_sam.run_record", "version": 1, "task": 1, "arm": "a", "status": "finished"}',
            "'task' must not be of type int",
        ),
        (
            '{"format": "hf_sam.run_record", "version": 1, "task": "t", "arm": "a", "status": "done"}',
            "status='done' is unknown",
        ),
        (
            '{"format": "hf_sam.run_record", "version": 1, "task": "t", "arm": "a", "status": "finished", '
            '"metrics": {"accuracy": "high"}}',
            r"metrics\['accuracy'\] must be a number",
        ),
        (
            '{"format": "hf_sam.run_record", "version": 1, "task": "t", "arm": "a", "status": "finished", '
            '"curves": [1]}',
            "'curves' must contain",
        ),
        (
            '{"format": "hf_sam.run_record", "version": 1, "task": "t", "arm": "a", "status": "finished", '
            '"survival": [1]}',
            "'survival' must contain one JSON object per treatment and draw",
        ),
    ],
)
def test_a_file_that_is_no_record_is_a_message(tmp_path, text, message):
    good = RunRecord(task="t", arm="a", status="finished")
    good.write(tmp_path / "good" / RECORD_NAME)
    bad = tmp_path / "bad" / RECORD_NAME
    bad.parent.mkdir()
    bad.write_text(text)
    with pytest.raises(RecordError, match=message):
        read_record(bad)
    records, problems = find_records(tmp_path)
    assert records == [good]
    assert len(problems) == 1
    assert str(bad) in problems[0]


def test_a_missing_or_binary_file_is_a_message(tmp_path):
    with pytest.raises(RecordError, match="cannot be read"):
        read_record(tmp_path / RECORD_NAME)
    (tmp_path / RECORD_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="not valid JSON"):
        read_record(tmp_path / RECORD_NAME)


def test_unknown_keys_of_the_same_version_are_left_alone(tmp_path):
    path = RunRecord(task="t", arm="a").write(tmp_path / RECORD_NAME)
    path.write_text(json.dumps({**json.loads(path.read_text()), "note": "by hand"}))
    assert read_record(path).arm == "a"


@pytest.mark.parametrize("key", ["hub_token", "push_to_hub_token", "token", "api_key", "WANDB_API_KEY", "db_password"])
def test_secrets_are_masked_by_key(key):
    assert plain({"nested": [{key: "value-1234"}]}) == {"nested": [{key: f"<{key.upper()}>"}]}
    assert plain({key: None}) == {key: None}


def test_what_only_looks_like_a_secret_is_kept():
    values = {"tokenizer": "bert", "max_new_tokens": 12, "nll_per_token": 3.25, "text": "hf_transfer is off"}
    assert plain(values) == values


def test_model_fingerprint_sees_one_changed_weight_of_a_head_and_a_change_of_dtype():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
    before = fingerprint_model(model)
    assert fingerprint_model(model) == before
    with torch.no_grad():
        model[1].weight[2, 5] += 1e-6
    changed = fingerprint_model(model)
    assert changed != before
    assert fingerprint_model(model.to(torch.bfloat16)) != changed


def test_data_fingerprint_is_of_the_content_in_its_order():
    data = Dataset.from_dict({"text": [f"row {i}" * (i % 3) for i in range(50)], "label": [i % 7 for i in range(50)]})
    part = data.select(range(7, 31))
    assert fingerprint_data(part) == fingerprint_data(Dataset.from_dict(data[7:31]))
    assert fingerprint_data(part) != fingerprint_data(part.shuffle(seed=0))
    noisy = part.map(lambda row, index: {"label": (row["label"] + (index == 3)) % 7}, with_indices=True)
    assert fingerprint_data(noisy) != fingerprint_data(part)
    assert fingerprint_data(data.to_iterable_dataset()) is None


def test_the_commit_is_known_in_a_checkout():
    git = describe_environment()["git"]
    assert git is None or (len(git["commit"]) == 40 and isinstance(git["dirty"], bool))


def test_the_norm_of_trained_weights_is_recorded_where_a_process_holds_them():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, dtype=torch.bfloat16))
    model[0].bias.requires_grad_(False)
    trained = [model[0].weight, model[1].weight, model[1].bias]
    expected = torch.cat([p.detach().double().flatten() for p in trained]).norm().item()
    assert describe_model(model)["trainable_norm"] == pytest.approx(expected, rel=1e-6)
    assert describe_model(model.to("meta"))["trainable_norm"] is None
