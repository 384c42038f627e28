"""The paper's figure of Hessian spectra with and without SAM (Foret et al. 2021, Figure 3), remade small."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_sam import SAMConfig, SAMTrainer
from hf_sam.sharpness import SharpnessConfig, Subset, SubsetLoss, measure, scalars


class PlainConvNet(nn.Module):
    """Two convolutions and two linear layers for 8 x 8 images, without normalisation of any kind."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )

    def forward(self, x: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        logits = self.layers(x)
        return SequenceClassifierOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


@pytest.mark.slow
def test_sam_ends_where_the_largest_eigenvalue_and_its_ratio_to_the_fifth_are_smaller(tmp_path):
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    train = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:1000].tolist()
    examples = [{"x": x[i].numpy(), "labels": int(digits.target[i])} for i in train]
    found = {}
    for rho in (0.0, 0.1):
        torch.manual_seed(0)
        model = PlainConvNet()
        args = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=500,
            per_device_train_batch_size=50,
            learning_rate=0.05,
            optim="sgd",
            optim_args="momentum=0.9",
            weight_decay=5e-4,
            lr_scheduler_type="cosine",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1000,
            seed=1,
        )
        SAMTrainer(model=model, args=args, train_dataset=examples, sam_config=SAMConfig(rho=rho)).train()
        loss = SubsetLoss(model, Subset(examples, batch_size=500))
        found[rho] = scalars(measure(loss, SharpnessConfig(measures=["sam", "hessian"])))
    print(found)
    assert found[0.0]["loss"] < 0.03 > found[0.1]["loss"], "both have learnt the training data"
    assert found[0.1]["lambda_1"] < 0.6 * found[0.0]["lambda_1"]
    assert found[0.1]["lambda_1_over_5"] < found[0.0]["lambda_1_over_5"]
