from pathlib import Path

from huggingface_hub import ModelCard
from integration import tiny

from hf_sam import SAMConfig


def test_the_trainers_card_has_the_section_and_the_tag_and_writing_twice_changes_nothing(tmp_path):
    trainer = tiny.trained(tiny.vit(0.0), tiny.images(), tmp_path, SAMConfig(method="asam", rho=0.3))
    trainer.create_model_card(dataset="digits", tasks="image-classification", tags=["vision"])
    text = Path(tmp_path, "README.md").read_text()
    card = ModelCard(text)
    assert {"sharpness-aware-minimization", "arxiv:2102.11600", "vision"} <= set(card.data.tags)
    assert "sam" not in card.data.tags  # which means Segment Anything
    assert "## Sharpness-aware minimization" in text
    assert "| perturbation size rho | 0.3 |" in text
    assert "| passes per step | 2 |" in text
    trainer.create_model_card(dataset="digits", tasks="image-classification", tags=["vision"])
    assert Path(tmp_path, "README.md").read_text() == text


def test_a_run_without_perturbation_is_not_tagged(tmp_path):
    trainer = tiny.trained(tiny.vit(0.0), tiny.images(), tmp_path, SAMConfig(rho=0))
    trainer.create_model_card()
    assert "sharpness-aware-minimization" not in (ModelCard.load(Path(tmp_path, "README.md")).data.tags or [])
