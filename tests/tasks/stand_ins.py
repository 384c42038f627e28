"""Small data sets with the columns, types and split names of those on the hub that the configurations name."""

from __future__ import annotations

import numpy as np
from conftest import SENTENCES
from datasets import ClassLabel, Dataset, Features, Image, List, Translation, Value
from PIL import Image as PILImage

ROWS = 12
TEXT, CLASSES, NUMBER = Value("string"), ClassLabel(names=["no", "yes"]), Value("float32")
THREE = ClassLabel(names=["entailment", "contradiction", "neutral"])
ENTITIES, PARTS = ClassLabel(names=["O", "B-PER", "I-PER"]), ClassLabel(names=["NN", "VB"])
TURNS = List({"role": TEXT, "content": TEXT})

# Data set (and its configuration): columns, names of the splits.
COLUMNS: dict[str, tuple[dict, tuple[str, ...]]] = {
    "digits": ({"image": Image(), "label": CLASSES}, ("train", "test")),
    "uoft-cs/cifar10": ({"img": Image(), "label": CLASSES}, ("train", "test")),
    "uoft-cs/cifar100": ({"img": Image(), "fine_label": CLASSES, "coarse_label": CLASSES}, ("train", "test")),
    "ufldl-stanford/svhn": ({"image": Image(), "label": CLASSES}, ("train", "test", "extra")),
    "zalando-datasets/fashion_mnist": ({"image": Image(), "label": CLASSES}, ("train", "test")),
    "ylecun/mnist": ({"image": Image(), "label": CLASSES}, ("train", "test")),
    "ILSVRC/imagenet-1k": ({"image": Image(), "label": CLASSES}, ("train", "validation", "test")),
    "timm/oxford-iiit-pet": (
        {"image": Image(), "label": CLASSES, "image_id": TEXT, "label_cat_dog": CLASSES},
        ("train", "test"),
    ),
    "nelorth/oxford-flowers": ({"image": Image(), "label": CLASSES}, ("train", "test")),
    "tanganke/stanford_cars": ({"image": Image(), "label": CLASSES}, ("train", "test")),
    "ethz/food101": ({"image": Image(), "label": CLASSES}, ("train", "validation")),
    "HuggingFaceM4/FGVC-Aircraft": (
        {"image": Image(), "family": CLASSES, "manufacturer": CLASSES, "variant": CLASSES},
        ("train", "validation", "test"),
    ),
    "glue/cola": ({"sentence": TEXT, "label": CLASSES}, ("train", "validation", "test")),
    "glue/sst2": ({"sentence": TEXT, "label": CLASSES}, ("train", "validation", "test")),
    "glue/mrpc": ({"sentence1": TEXT, "sentence2": TEXT, "label": CLASSES}, ("train", "validation", "test")),
    "glue/stsb": ({"sentence1": TEXT, "sentence2": TEXT, "label": NUMBER}, ("train", "validation", "test")),
    "glue/qqp": ({"question1": TEXT, "question2": TEXT, "label": CLASSES}, ("train", "validation", "test")),
    "glue/mnli": (
        {"premise": TEXT, "hypothesis": TEXT, "label": CLASSES},
        ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"),
    ),
    "glue/qnli": ({"question": TEXT, "sentence": TEXT, "label": CLASSES}, ("train", "validation", "test")),
    "glue/rte": ({"sentence1": TEXT, "sentence2": TEXT, "label": CLASSES}, ("train", "validation", "test")),
    "glue/wnli": ({"sentence1": TEXT, "sentence2": TEXT, "label": CLASSES}, ("train", "validation", "test")),
    "aps/super_glue/boolq": ({"question": TEXT, "passage": TEXT, "label": CLASSES}, ("train", "validation", "test")),
    "aps/super_glue/cb": ({"premise": TEXT, "hypothesis": TEXT, "label": THREE}, ("train", "validation", "test")),
    "aps/super_glue/copa": (
        {"premise": TEXT, "choice1": TEXT, "choice2": TEXT, "question": TEXT, "label": CLASSES},
        ("train", "validation", "test"),
    ),
    "aps/super_glue/wic": (
        {"word": TEXT, "sentence1": TEXT, "sentence2": TEXT, "label": CLASSES},
        ("train", "validation", "test"),
    ),
    "EdinburghNLP/xsum": ({"document": TEXT, "summary": TEXT, "id": TEXT}, ("train", "validation", "test")),
    "knkarthick/samsum": ({"id": TEXT, "dialogue": TEXT, "summary": TEXT}, ("train", "validation", "test")),
    "wmt/wmt16": ({"translation": Translation(["en", "ro"])}, ("train", "validation", "test")),
    "Helsinki-NLP/opus_books": ({"id": TEXT, "translation": Translation(["en", "fr"])}, ("train",)),
    "eriktks/conll2003": (
        {"id": TEXT, "tokens": List(TEXT), "pos_tags": List(PARTS), "ner_tags": List(ENTITIES)},
        ("train", "validation", "test"),
    ),
    "unimelb-nlp/wikiann": (
        {"tokens": List(TEXT), "ner_tags": List(ENTITIES), "langs": List(TEXT), "spans": List(TEXT)},
        ("train", "validation", "test"),
    ),
    "Salesforce/wikitext": ({"text": TEXT}, ("train", "validation", "test")),
    "trl-lib/Capybara": ({"messages": TURNS, "source": TEXT}, ("train", "test")),
    "trl-lib/tldr": ({"prompt": TEXT, "completion": TEXT}, ("train", "validation", "test")),
    "images": ({"image": Image(), "label": CLASSES}, ("train", "test")),
    "texts": ({"text": TEXT, "label": CLASSES}, ("train", "test")),
    "corpus": ({"text": TEXT}, ("train", "test")),
    "words": ({"tokens": List(TEXT), "tags": List(ENTITIES)}, ("train", "test")),
}


def write(name: str, folder) -> str:
    """Write the stand-in for `name` as parquet files, one a split, and return the folder."""
    columns, splits = COLUMNS[name]
    for split in splits:
        unlabelled = split.startswith("test") and name.startswith(("glue/", "aps/", "ILSVRC"))
        rows = {column: [_value(feature, i, unlabelled) for i in range(ROWS)] for column, feature in columns.items()}
        if name == "Salesforce/wikitext":
            rows["text"][3] = ""
        Dataset.from_dict(rows, features=Features(columns)).to_parquet(f"{folder}/{split}-00000.parquet")
    return str(folder)


def _value(feature, i: int, unlabelled: bool):
    if isinstance(feature, Image):
        return image(i)
    if isinstance(feature, ClassLabel):
        return -1 if unlabelled else i % feature.num_classes
    if isinstance(feature, Translation):
        return {language: SENTENCES[(i + shift) % 8] for shift, language in enumerate(feature.languages)}
    if isinstance(feature, List) and feature is not TURNS:
        words = SENTENCES[i % len(SENTENCES)].split()
        inner = feature.feature
        return words if inner is TEXT else [k % inner.num_classes for k in range(len(words))]
    if feature is NUMBER:
        return -1.0 if unlabelled else i / ROWS
    if feature is TURNS:
        return [{"role": "user", "content": "what film"}, {"role": "assistant", "content": SENTENCES[i % 8]}]
    return SENTENCES[i % len(SENTENCES)]


def image(i: int, size: int = 20) -> PILImage.Image:
    """A noisy image, dark or bright."""
    pixels = np.random.default_rng(i).integers(0, 128, (size, size, 3)) + 100 * (i % 2)
    return PILImage.fromarray(pixels.astype(np.uint8))
