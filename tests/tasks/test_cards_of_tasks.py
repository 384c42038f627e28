"""The card's section and metadata, whole, and as the hub's own library reads them."""

from __future__ import annotations

import dataclasses
import types

import pytest
from huggingface_hub import ModelCard, metadata_eval_result
from huggingface_hub.repocard import metadata_load

from hf_sam import METHODS, SAMConfig
from hf_sam.model_card import BaseModel, SAMCard, insert_section, write_model_card

CARD = SAMCard(
    config=SAMConfig(rho=0.1, perturb="norm"),
    name="cells",
    path="me/cells",
    optimizer="adamw_torch, learning rate 5e-05, weight decay 0.01",
    scope="device",
    m=32,
    passes=2.0,
    cost=2.07,
    task="image-classification",
    datasets=["me/solar"],
    metrics={"test_accuracy": 0.8125, "test_f1_macro": 0.75},
)
SECTION = """\
<!-- hf_sam: generated from here -->

## Sharpness-aware minimization

| | |
|---|---|
| method | `sam`: Step along the gradient at w + eps, with eps = rho g / \\|\\|g\\|\\|. |
| paper | [Foret et al. 2021, arXiv 2010.01412, Algorithm 1](https://arxiv.org/abs/2010.01412) |
| perturbation size rho | 0.1 |
| norm p | 2 |
| scope | device |
| examples per perturbation (m) | 32 |
| passes per step | 2 |
| measured cost of a step | 2.07 times that of one pass |
| base optimizer | adamw_torch, learning rate 5e-05, weight decay 0.01 |
| `perturb` | `norm` |

## Results

On the test split of me/solar:

| | |
|---|---|
| accuracy | 0.8125 |
| f1_macro | 0.7500 |

## How to load

```python
from transformers import pipeline

model = pipeline("image-classification", model="me/cells")
```

<!-- hf_sam: to here -->"""


def fake_trainer(folder, config=None, first=True):
    """What the card reads of a trainer that has been trained."""
    args = types.SimpleNamespace(
        output_dir=str(folder),
        optim=types.SimpleNamespace(value="adamw_torch"),
        learning_rate=5e-5,
        weight_decay=0.0,
        train_batch_size=4,
        gradient_accumulation_steps=2,
        world_size=1,
    )
    history = [
        {"loss": 1.0, "step": 1},
        {"eval_accuracy": 0.5, "eval_runtime": 1.0, "step": 1},
        {"train_runtime": 3.0, "sam_passes": 2.0, "sam_cost": 2.25, "step": 2},
        {"test_accuracy": 0.75, "test_runtime": 1.0, "test_samples_per_second": 3.0, "step": 2},
    ]
    return types.SimpleNamespace(
        args=args,
        sam_config=config or SAMConfig(),
        state=types.SimpleNamespace(log_history=history),
        model=object(),
        accelerator=types.SimpleNamespace(unwrap_model=lambda model: model),
        is_world_process_zero=lambda: first,
        _sam=types.SimpleNamespace(scope="device", effective_m=lambda b, a: b * a),
    )


def test_section_whole():
    assert CARD.text() == SECTION


@pytest.mark.parametrize("method", METHODS)
def test_every_method_names_its_paper_and_links_it(method):
    card = dataclasses.replace(CARD, config=SAMConfig(method=method))
    assert f"`{method}`" in card.text()
    assert METHODS[method].paper in card.text()
    for tag in card.tags[1:]:
        assert f"https://arxiv.org/abs/{tag.removeprefix('arxiv:')}" in card.text()


def test_tags_never_say_segment_anything():
    assert "sharpness-aware-minimization" in CARD.tags
    assert not {"sam", "SAM"} & set(CARD.tags)


def test_stock_run_says_nothing_about_perturbations():
    card = dataclasses.replace(CARD, config=SAMConfig(rho=0))
    assert card.tags == []
    assert "Sharpness" not in card.text()
    assert "accuracy" in card.text()


def test_what_is_not_known_is_left_out():
    card = dataclasses.replace(CARD, scope=None, m=None, passes=None, cost=None, task=None, metrics={})
    assert "None" not in card.text()
    assert card.eval_results == []


def test_written_card_is_what_the_hub_reads(tmp_path):
    path = write_model_card(fake_trainer(tmp_path / "run"), dataset="me/solar", task="image-classification")
    card = ModelCard.load(path)
    assert card.data.pipeline_tag == "image-classification"
    assert [(r.metric_type, r.metric_value) for r in card.data.eval_results] == [("accuracy", 0.75)]
    expected = metadata_eval_result(
        model_pretty_name="run",
        task_pretty_name=None,
        task_id="image-classification",
        metrics_pretty_name="accuracy",
        metrics_id="accuracy",
        metrics_value=0.75,
        dataset_pretty_name="me/solar",
        dataset_id="me/solar",
        dataset_split="test",
    )
    written, wanted = metadata_load(path)["model-index"][0], expected["model-index"][0]
    assert written["results"][0]["dataset"] == wanted["results"][0]["dataset"]
    assert written["results"][0]["metrics"][0].items() <= wanted["results"][0]["metrics"][0].items()
    assert "2.25 times that of one pass" in card.text
    assert "| examples per perturbation (m) | 8 |" in card.text


def test_what_others_wrote_stays_and_writing_twice_changes_nothing(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\ntags:\n- trl\n---\n\n# Mine\n\nMy words.\n\n## Training procedure\n\nTheirs.\n"
    )
    trainer = fake_trainer(tmp_path)
    first = write_model_card(trainer, dataset="me/solar", task="image-classification").read_text()
    assert "My words." in first
    assert first.index("## Sharpness-aware") < first.index("## Training procedure") < first.index("Theirs.")
    card = ModelCard(first)
    assert (card.data.license, card.data.tags[0]) == ("mit", "trl")
    assert write_model_card(trainer, dataset="me/solar", task="image-classification").read_text() == first


DRAFT = """\
---
library_name: transformers
base_model: {base}
licence: license
---

<!-- This model card has been generated automatically according to the information the Trainer had access to. You
should probably proofread and complete it, then remove this comment. -->

# run

This model is a fine-tuned version of [](https://huggingface.co/) on an unknown dataset.
"""


def test_a_draft_gives_way_to_one_whole_card(tmp_path):
    (tmp_path / "README.md").write_text(DRAFT.format(base="''"))
    trainer = fake_trainer(tmp_path)
    trainer.state.log_history[2:2] = [{"loss": 0.5, "eval_loss": 0.7, "step": step} for step in range(2, 40)]
    text = write_model_card(trainer, dataset="me/solar", task="image-classification").read_text()
    card = ModelCard(text)
    assert card.text.count("\n# ") == 1
    assert "generated automatically" not in text
    assert "[](" not in text
    assert card.data.to_dict().keys() >= {"library_name", "model-index", "pipeline_tag", "tags"}
    assert "licence" not in text
    assert "A object trained from scratch on me/solar." in text
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        "## Sharpness-aware minimization",
        "## Results",
        "## Training curve",
        "## How to load",
        "## Training procedure",
    ]
    curve = text.split("## Training curve")[1].split("##")[0].strip().splitlines()
    assert curve[0] == "| step | training loss | validation loss |"
    assert len(curve) == 2 + 10
    assert curve[-1] == "| 39 | 0.5000 | 0.7000 |"
    assert write_model_card(trainer, dataset="me/solar", task="image-classification").read_text() == text


def model_from(name):
    return types.SimpleNamespace(config=types.SimpleNamespace(_name_or_path=str(name)))


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        (None, "{}", ("minilm", None)),
        ("# sentence-transformers/all-MiniLM", "{}", "sentence-transformers/all-MiniLM"),
        (
            "model = AutoModel.from_pretrained('facebook/dinov2-small')",
            '{"_name_or_path": "a/b"}',
            "facebook/dinov2-small",
        ),
        ("# MiniLM", '{"_name_or_path": "nreimers/MiniLM"}', "nreimers/MiniLM"),
        ("# MiniLM", '{"_name_or_path": "/home/me/minilm"}', ("minilm", None)),
        ('<!-- hf_sam: generated from here -->\npipeline("t", model="outputs/run")', "{}", ("minilm", None)),
    ],
)
def test_the_base_of_a_model_from_a_folder(tmp_path, card, config, expected):
    folder = tmp_path / "minilm"
    folder.mkdir()
    (folder / "config.json").write_text(config)
    if card is not None:
        (folder / "README.md").write_text(card)
    expected = (expected, expected) if isinstance(expected, str) else expected
    assert dataclasses.astuple(BaseModel.of(model_from(folder))) == expected


def test_the_base_of_other_models(tmp_path):
    assert BaseModel.of(model_from("")) is None
    assert BaseModel.of(object()) is None
    assert BaseModel.of(model_from("openai-community/gpt2")).link == (
        "[openai-community/gpt2](https://huggingface.co/openai-community/gpt2)"
    )
    cached = tmp_path / "models--facebook--dinov2-small/snapshots/0a1b"
    cached.mkdir(parents=True)
    assert BaseModel.of(model_from(cached)).hub_id == "facebook/dinov2-small"


def test_only_the_first_process_writes(tmp_path):
    assert write_model_card(fake_trainer(tmp_path / "run", first=False)) is None
    assert not (tmp_path / "run").exists()


def test_section_goes_to_the_end_where_there_is_no_training_procedure():
    assert insert_section("# Title\n", "<!-- section -->").strip() == "# Title\n\n<!-- section -->"
