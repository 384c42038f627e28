"""Every script in `examples/` runs as it is written, with small stand-ins for what it takes from the hub."""

from __future__ import annotations

import runpy

import pytest
import stand_ins
import transformers
from conftest import ROOT, SENTENCES
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

AUTO = ("AutoImageProcessor", "AutoModelForImageClassification", "AutoTokenizer")
AUTO_TEXT = ("AutoModelForSequenceClassification", "AutoModelForCausalLM")


def data_of_the_hub(name):
    if name == "AI-Lab-Makerere/beans":
        names = ClassLabel(names=["angular_leaf_spot", "bean_rust", "healthy"])
        rows = {"image": [stand_ins.image(i) for i in range(12)], "labels": [i % 3 for i in range(12)]}
        part = Dataset.from_dict(rows, features=Features({"image": Image(), "labels": names}))
    elif name == "cornell-movie-review-data/rotten_tomatoes":
        rows = {"text": SENTENCES, "label": [i % 2 for i in range(len(SENTENCES))]}
        part = Dataset.from_dict(rows, features=Features({"text": Value("string"), "label": ClassLabel(num_classes=2)}))
    else:
        return DatasetDict(train=Dataset.from_dict({"quote": SENTENCES * 3, "author": ["?"] * 24}))
    return DatasetDict(train=part, validation=part, test=part)


SHORT = {
    "max_steps": 2,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "disable_tqdm": True,
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft 0.21
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_example(script, encoder, decoder, vision, monkeypatch, tmp_path, capsys):
    folders = {
        "facebook/dinov2-small": vision,
        "sentence-transformers/all-MiniLM-L6-v2": encoder,
        "HuggingFaceTB/SmolLM2-135M": decoder,
    }
    for name in (*AUTO, *AUTO_TEXT):
        auto = getattr(transformers, name)
        load = auto.from_pretrained
        monkeypatch.setattr(auto, "from_pretrained", lambda path, load=load, **words: load(folders[path], **words))
    monkeypatch.setattr("datasets.load_dataset", data_of_the_hub)
    make = transformers.TrainingArguments.__init__
    monkeypatch.setattr(
        transformers.TrainingArguments, "__init__", lambda self, *args, **words: make(self, *args, **{**words, **SHORT})
    )
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))
    assert "eval_loss" in capsys.readouterr().out
