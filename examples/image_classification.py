"""Fine-tune DINOv2 on photographs of bean leaves. The ordinary Trainer script; the lines with `SAM` are what changes."""

import torch
from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainingArguments

from hf_sam import SAMConfig, SAMTrainer

data = load_dataset("AI-Lab-Makerere/beans")
names = data["train"].features["labels"].names
processor = AutoImageProcessor.from_pretrained("facebook/dinov2-small")
model = AutoModelForImageClassification.from_pretrained(
    "facebook/dinov2-small", id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
)


def collate(rows):
    images = [row["image"].convert("RGB") for row in rows]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


trainer = SAMTrainer(
    model=model,
    args=TrainingArguments(
        "dinov2-beans", num_train_epochs=3, learning_rate=5e-5, warmup_steps=0.1, remove_unused_columns=False
    ),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    data_collator=collate,
    compute_metrics=accuracy,
    sam_config=SAMConfig(),
)
trainer.train()
print(trainer.evaluate())
