"""Images become what the model takes, the same in every process, epoch by epoch and after a resume."""

from __future__ import annotations

import numpy as np
import pytest
import stand_ins
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import BitImageProcessorPil, ViTImageProcessorPil

from hf_sam.tasks.command_line.errors import UserError
from hf_sam.tasks.data.images import (
    AUGMENTATIONS,
    ImageDataset,
    ImageTransform,
    open_image,
    output_size,
    set_output_size,
)

PROCESSOR = ViTImageProcessorPil(size={"height": 16, "width": 16}, do_convert_rgb=True)
RANDOM = [name for name in AUGMENTATIONS if name != "none"]


def dataset(augmentation: str, seed: int = 0) -> ImageDataset:
    rows = {"image": [stand_ins.image(i) for i in range(6)], "label": [0, 1] * 3}
    data = Dataset.from_dict(rows, features=Features({"image": Image(), "label": ClassLabel(names=["a", "b"])}))
    return ImageDataset(data, "image", "label", ImageTransform(PROCESSOR, augmentation), "train", seed)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_shape_and_range(augmentation):
    pixels = dataset(augmentation)[0]["pixel_values"]
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    assert -1 <= pixels.min() < pixels.max() <= 1


def test_without_augmentation_it_is_the_processor():
    expected = PROCESSOR(stand_ins.image(2), return_tensors="pt")["pixel_values"][0]
    data = dataset("none")
    assert torch.equal(data[2]["pixel_values"], expected)
    assert torch.equal(data[2]["pixel_values"], expected)  # from memory
    assert [data[i]["labels"] for i in range(6)] == [0, 1] * 3


@pytest.mark.parametrize("augmentation", RANDOM)
def test_what_is_drawn_depends_on_seed_epoch_and_example_alone(augmentation):
    first, again = dataset(augmentation), dataset(augmentation)
    torch.manual_seed(0)
    images = [first[i]["pixel_values"] for i in range(6)]
    torch.manual_seed(1)
    np.random.seed(1)
    for i in reversed(range(6)):
        assert torch.equal(again[i]["pixel_values"], images[i])
    again.start_epoch(1)
    assert any(not torch.equal(again[i]["pixel_values"], images[i]) for i in range(6))
    other = dataset(augmentation, seed=1)
    assert any(not torch.equal(other[i]["pixel_values"], images[i]) for i in range(6))


def test_augmentation_leaves_the_process_random_state_alone():
    before = torch.random.get_rng_state()
    for name in RANDOM:
        dataset(name)[0]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_cutout_greys_a_square():
    white = PILImage.new("RGB", (16, 16), "white")
    drawn = [np.asarray(AUGMENTATIONS["cutout"](white, 16, np.random.default_rng(i))) for i in range(20)]
    grey = [(image == 128).all(axis=2).sum() for image in drawn]
    assert max(grey) == 64
    assert min(grey) >= 16


def test_resized_crop_of_an_extreme_aspect():
    image = PILImage.new("RGB", (400, 4))
    assert AUGMENTATIONS["resized_crop"](image, 16, np.random.default_rng(0)).size == (16, 16)


def test_output_size_is_set_the_way_the_processor_has():
    bit, vit = BitImageProcessorPil(), ViTImageProcessorPil()
    for processor in (bit, vit):
        set_output_size(processor, 98)
        assert output_size(processor) == 98
        assert processor(PILImage.new("RGB", (300, 200)), return_tensors="pt")["pixel_values"].shape == (1, 3, 98, 98)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16", "F"])
def test_every_mode_becomes_rgb(mode):
    assert (
        open_image(
            PILImage.new("L", (4, 6), 7).convert("I").convert(mode) if mode == "I;16" else PILImage.new(mode, (4, 6)),
            "x",
        ).mode
        == "RGB"
    )


def test_a_rotated_photograph_is_put_upright(tmp_path):
    exif = PILImage.Exif()
    exif[0x0112] = 6
    PILImage.new("RGB", (4, 6)).save(tmp_path / "a.jpg", exif=exif)
    assert open_image(str(tmp_path / "a.jpg"), "x").size == (6, 4)


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": None}])
def test_no_image_at_all(value):
    with pytest.raises(UserError, match="train image 3 is empty"):
        open_image(value, "train image 3")


def test_half_an_image_names_its_file(tmp_path):
    stand_ins.image(0).save(tmp_path / "a.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    with pytest.raises(UserError, match=r"test image 3 \(.*half.png\) cannot be opened: "):
        open_image({"path": str(tmp_path / "half.png"), "bytes": None}, "test image 3")


def test_a_palette_with_transparency_opens_without_a_warning():
    image = PILImage.new("P", (4, 4), 1)
    image.info["transparency"] = b"\x00\xff"
    assert open_image(image, "an image").mode == "RGB"
