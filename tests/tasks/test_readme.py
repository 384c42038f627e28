"""What the recipes' README names exists."""

from __future__ import annotations

import dataclasses
import re

from conftest import ROOT
from transformers import TrainingArguments

from hf_sam.tasks import causal_lm, image_classification, seq2seq, text_classification, token_classification
from hf_sam.tasks.command_line.arguments import SAMArguments
from hf_sam.tasks.command_line.options import DataArguments, ModelArguments, RunArguments

TEXT = (ROOT / "recipes/README.md").read_text()
KINDS = (
    ModelArguments,
    DataArguments,
    RunArguments,
    SAMArguments,
    TrainingArguments,
    image_classification.ImageArguments,
    text_classification.TextArguments,
    causal_lm.LanguageArguments,
    seq2seq.Seq2SeqArguments,
    seq2seq.GenerationArguments,
    token_classification.WordArguments,
)


def test_arguments_exist():
    fields = {field.name for kind in KINDS for field in dataclasses.fields(kind)} | {"help", "config_file"}
    assert set(re.findall(r"--(\w+)", TEXT)) <= fields


def test_configurations_exist():
    for folder, names in re.findall(r"\| `(\w+_classification|seq2seq)/`? ?`?([^|]*)` ?\|", TEXT):
        for name in re.findall(r"[a-z][\w*]+", names.split(" --")[0]):
            assert list((ROOT / "configs" / folder).glob(f"{name}.yaml")), f"{folder}/{name}"


def test_files_exist():
    for path in re.findall(r"(?:configs|recipes)/[\w/.]+", TEXT):
        assert (ROOT / path).exists(), path
