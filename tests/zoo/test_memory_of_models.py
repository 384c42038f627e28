"""One copy of what is perturbed, whatever the model: also where one tensor is most of it.

Peaks are those of torch's allocator over the whole run, temporary copies inside of an operation included.
"""

from __future__ import annotations

import functools
import gc
import tempfile

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_sam import SAMConfig, SAMTrainer
from hf_sam.benchmark.counting import PeakMemory
from hf_sam.methods.table import METHODS
from hf_sam.update import step

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT reads it
)

MANY = 8192
SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
# Generator states that are put aside, and numbers by the hundred, which a larger model would not show.
SLACK = 32 * 2**10


def bert():
    """Nine tenths are the token embedding, as half of them are in small sentence encoders."""
    return BertForSequenceClassification(BertConfig(vocab_size=MANY, num_labels=3, max_position_embeddings=32, **SMALL))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=MANY, n_embd=64, n_layer=1, n_head=2, n_positions=32))


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=MANY, tie_word_embeddings=False, **SMALL))


def vit():
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=MANY, **SMALL))


def frozen_embedding():
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    return model


def adapter():
    return get_peft_model(gpt2(), LoraConfig(r=64, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True))


def adapter_and_head():
    return get_peft_model(llama(), LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["lm_head"]))


MODELS = {
    "token embedding": bert,
    "embedding and output tied": gpt2,
    "embedding and output": llama,
    "large head": vit,
    "frozen embedding": frozen_embedding,
    "adapter": adapter,
    "adapter and whole head": adapter_and_head,
}


def examples(name: str, dtype: torch.dtype) -> list[dict]:
    if name == "large head":
        return [{"pixel_values": torch.randn(3, 16, 16, dtype=dtype), "labels": i} for i in range(4)]
    ids = [torch.arange(4) + i for i in range(4)]
    return [{"input_ids": row, "labels": i % 3 if name == "token embedding" else row} for i, row in enumerate(ids)]


def perturbed(model: nn.Module, selected: str) -> int:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return sum(p.nbytes for n, p in named if selected == "all" or "norm" in n.lower())


def watched(model: nn.Module) -> int:
    """Bytes of the parameters without gradient that are copied while the first steps are watched."""
    left = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    found = 0
    for p in sorted((p for p in model.parameters() if not p.requires_grad), key=torch.Tensor.numel):
        if p.nbytes <= left - found:
            found += p.nbytes
    return found


def peak(name: str, sam: SAMConfig | None, dtype: torch.dtype, optim: str, max_steps: int) -> tuple[int, int]:
    """Bytes at the worst moment of a run, and bytes of what is perturbed."""
    gc.collect()
    with tempfile.TemporaryDirectory() as folder, PeakMemory() as memory:
        set_seed(0)
        model = MODELS[name]().to(dtype)
        size = perturbed(model, "all" if sam is None else sam.perturb or "all")
        args = TrainingArguments(
            folder,
            use_cpu=True,
            per_device_train_batch_size=1,
            max_steps=max_steps,
            optim=optim,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        common = {"model": model, "args": args, "train_dataset": examples(name, dtype)}
        trainer = Trainer(**common) if sam is None else SAMTrainer(**common, sam_config=sam)
        memory.from_here(args.device)
        trainer.train()
    return memory.bytes(), size


@functools.cache
def stock_peak(name: str, dtype: torch.dtype, optim: str, max_steps: int) -> int:
    return peak(name, None, dtype, optim, max_steps)[0]


def assert_holds(copies: float, name: str, sam: SAMConfig, dtype=torch.float32, optim="sgd", max_steps=2) -> None:
    """Beyond the stock run's peak; most of which are the weights and their gradients, so that nothing hides in it."""
    stock = stock_peak(name, dtype, optim, max_steps)
    ours, size = peak(name, sam, dtype, optim, max_steps)
    most = (copies + 0.1) * size + watched(MODELS[name]().to(dtype)) + SLACK
    assert ours - stock <= most, f"{(ours - stock) / size:.2f} copies"


@pytest.fixture(params=[False, True], ids=["tensor by tensor", "in buckets"])
def in_buckets(request, monkeypatch):
    monkeypatch.setattr(step, "IN_BUCKETS", request.param)


@pytest.mark.usefixtures("in_buckets")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_one_copy_of_what_is_perturbed(name, dtype):
    """In steps that log, and in the first ones, in which passes are watched."""
    assert_holds(1, name, SAMConfig(rho=0.05), dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("in_buckets")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("p", [1, 1.5, 3, "inf"])
def test_one_copy_for_every_norm(p, dtype):
    assert_holds(1, "token embedding", SAMConfig(rho=0.05, p=p), dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("in_buckets")
def test_one_copy_with_stochastic_rounding():
    assert_holds(1, "token embedding", SAMConfig(rho=0.05, stochastic_rounding=True), torch.bfloat16)


# An adapter's own small tensors, and rare classes, are not what this is about; docs/methods.md names zsharp's peak.
NOT_HERE = {"bilora", "flat-lora", "imbsam", "zsharp"}


@pytest.mark.usefixtures("in_buckets")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", sorted(METHODS.keys() - NOT_HERE - {"sam"}))
def test_every_row_holds_the_copies_it_declares(method, dtype):
    interval = {"interval": 2} if method in ("periodic", "looksam", "carried") else {}
    sam = SAMConfig(method=method, rho=0.05, **interval)
    optim = "adamw_torch_fused" if method in ("precond", "msam") else "sgd"
    assert_holds(sam.parts.copies, "token embedding", sam, dtype, optim, max_steps=3)
