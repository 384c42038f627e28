"""Losses that a second pass or a part of the batch would change are refused: generated inputs, in-batch negatives."""

from __future__ import annotations

import pytest
import torch
from integration import equivalence, tiny
from integration.equivalence import assert_like_stock
from integration.test_other_trainers import common
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, Trainer, TrainerCallback, set_seed

from hf_sam import SAMConfig, SAMTrainer, SAMTrainerMixin

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL's
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

# --- generation inside of a step ----------------------------------------------------------------------------------


def assert_refused(run, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern) as error:
        run()
    message = str(error.value)
    assert "\n" not in message
    assert len(message) > 60, "says why, and what to do"


def generated(model, inputs):
    was_training = model.training
    model.eval()
    with torch.no_grad():
        tokens = model.generate(
            inputs["input_ids"][:, :3], attention_mask=torch.ones_like(inputs["input_ids"][:, :3]),
            max_new_tokens=4, do_sample=True, pad_token_id=0,
        )  # fmt: skip
    model.train(was_training)
    return {"input_ids": tokens, "labels": tokens.clone()}


class GeneratesInTrainingStep(Trainer):
    """Trains on what the model itself writes, as on-policy distillation does."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, generated(self.model, inputs), num_items_in_batch)


class GeneratesInComputeLoss(Trainer):
    """Rewards what the model writes."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, generated(self.model, inputs), return_outputs, **kwargs)


class GeneratesInPrepareInputs(Trainer):
    def _prepare_inputs(self, inputs):
        return generated(self.model, super()._prepare_inputs(inputs))


def run_language_model(cls, folder, sam=None, **options):
    args = {"max_steps": 2, "max_grad_norm": 1.0} | options.pop("args", {})
    set_seed(2)
    trainer = cls(
        model=tiny.llama(),
        args=tiny.arguments(folder, **args),
        train_dataset=tiny.texts(),
        **({} if sam is None else {"sam_config": sam}),
        **options,
    )
    trainer.train()
    trainer.random_after = (torch.get_rng_state(),)
    return trainer


@pytest.mark.parametrize(
    "cls", [GeneratesInTrainingStep, GeneratesInComputeLoss, GeneratesInPrepareInputs], ids=lambda cls: cls.__name__
)
@pytest.mark.parametrize("sam", [{}, {"scope": "micro"}, {"method": "gsam"}], ids=str)
def test_a_trainer_that_generates_what_it_trains_on(cls, sam, tmp_path):
    sam_cls = type(f"SAM{cls.__name__}", (SAMTrainerMixin, cls), {})
    assert_refused(lambda: run_language_model(sam_cls, tmp_path, SAMConfig(**sam)), "generat")


def test_a_subclass_of_ours_that_generates_in_compute_loss(tmp_path):
    class Ours(SAMTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return super().compute_loss(model, generated(self.model, inputs), return_outputs, **kwargs)

    assert_refused(lambda: run_language_model(Ours, tmp_path, SAMConfig()), "generat")


def test_refused_generation_leaves_the_weights_alone(tmp_path):
    cls = type("SAMGenerates", (SAMTrainerMixin, GeneratesInTrainingStep), {})
    model = tiny.llama()
    with pytest.raises(ValueError, match="generat"):
        args = tiny.arguments(tmp_path, max_steps=2)
        cls(model=model, args=args, train_dataset=tiny.texts(), sam_config=SAMConfig()).train()
    assert tiny.same_bits(tiny.state(model), tiny.state(tiny.llama()))


def test_rho_zero_generates_as_it_likes(tmp_path):
    """One pass is the stock Trainer's."""
    cls = type("SAMGenerates", (SAMTrainerMixin, GeneratesInTrainingStep), {})
    ours = run_language_model(cls, tmp_path, SAMConfig(rho=0))
    assert_like_stock(ours, run_language_model(GeneratesInTrainingStep, tmp_path), perturbs=False)


class Samples(TrainerCallback):
    """Shows what the model writes, between the steps."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        generated(model, {"input_ids": tiny.texts(2)[0]["input_ids"][None]})

    on_step_begin = on_log = on_step_end


def test_generation_between_steps_is_nobodys_business(tmp_path):
    runs = [
        run_language_model(cls, tmp_path, sam, callbacks=[Samples()])
        for cls, sam in ((SAMTrainer, SAMConfig(rho=1e-30)), (Trainer, None))
    ]
    assert_like_stock(*runs)


def test_generation_in_evaluation_is_nobodys_business(tmp_path):
    class Evaluates:
        def prediction_step(self, model, inputs, *args, **kwargs):
            generated(model, inputs)
            return super().prediction_step(model, inputs, *args, **kwargs)

    ours = type("Ours", (Evaluates, SAMTrainer), {})
    stock = type("Stock", (Evaluates, Trainer), {})
    options = {"eval_dataset": tiny.texts(4), "args": {"eval_strategy": "steps", "eval_steps": 1}}
    runs = [
        run_language_model(c, tmp_path, s, **dict(options)) for c, s in ((ours, SAMConfig(rho=1e-30)), (stock, None))
    ]
    assert_like_stock(*runs)


def conversations(n: int = 8):
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": "<3> <4>"}, {"role": "assistant", "content": f"<{5 + i}> <6>"}]}
            for i in range(n)
        ]
    )


CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.mark.parametrize("lmbda", [1.0, 0.5])
def test_generalized_knowledge_distillation(lmbda, tmp_path):
    """TRL's GKD writes new answers in `training_step`, one for each pass, by a coin that is tossed in each pass."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class SAMGKD(SAMTrainerMixin, GKDTrainer):
        pass

    tokenizer = equivalence.words_as_tokens()
    tokenizer.chat_template = CHAT

    def run(sam):
        args = GKDConfig(**common(tmp_path, lmbda=lmbda, max_new_tokens=4, max_length=16))
        set_seed(0)
        trainer = SAMGKD(
            model=tiny.llama(),
            teacher_model=tiny.llama(),
            args=args,
            train_dataset=conversations(),
            processing_class=tokenizer,
            sam_config=sam,
        )
        trainer.train()
        return trainer

    assert all(loss > 0 for loss in tiny.logged(run(SAMConfig(rho=0)), "grad_norm")), "the stock trainer trains"
    assert_refused(lambda: run(SAMConfig()), "generat")


# --- in-batch negatives -------------------------------------------------------------------------------------------

PARTS = [
    ("m", {"scope": "micro", "m": 1}),
    ("m", {"scope": "micro", "m": 2}),
    ("ascent_fraction", {"ascent_fraction": 0.5}),
    ("ascent_fraction|subset", {"method": "subset"}),
    ("esam", {"method": "esam"}),
]
of_every_part = pytest.mark.parametrize(("field", "sam"), PARTS, ids=lambda value: str(value))


def clip():
    set_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPModel(
        CLIPConfig(
            text_config={**small, "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 16, "eos_token_id": 2},
            vision_config={**small, "image_size": 8, "patch_size": 4},
            projection_dim=8,
        )
    )


def captions(n: int = 32):
    return [
        {"pixel_values": image["pixel_values"], "input_ids": text["input_ids"]}
        for image, text in zip(tiny.images(n), tiny.texts(n), strict=True)
    ]


def collate_captions(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | {"return_loss": True}


@of_every_part
def test_the_contrastive_loss_of_clip(field, sam, tmp_path):
    def run():
        equivalence.trained(
            SAMConfig(rho=0.05, **sam),
            tmp_path,
            model=clip,
            data=captions(),
            extra=lambda model: {"data_collator": collate_captions},
        )

    assert_refused(run, rf"\b({field})\b")


@pytest.mark.parametrize(("scope", "accumulation"), [("device", 1), ("micro", 2), ("device", 2)])
def test_the_contrastive_loss_of_clip_in_whole_batches(scope, accumulation, tmp_path):
    runs = equivalence.both(
        tmp_path,
        scope,
        accumulation,
        model=clip,
        data=captions(),
        extra=lambda model: {"data_collator": collate_captions},
    )
    assert_like_stock(*runs)


class Contrastive:
    """Each example against its noisy copy, and all others of the batch as negatives."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        left, right = model(x=inputs["x"])["logits"], model(x=inputs["x"] + 0.1)["logits"]
        logits = F.normalize(left, dim=1) @ F.normalize(right, dim=1).T / 0.2
        loss = F.cross_entropy(logits, torch.arange(len(logits)))
        return (loss, {"logits": logits}) if return_outputs else loss


class ContrastiveModel(tiny.Mlp):
    """The same inside of the model."""

    def forward(self, x, labels=None):
        left, right = super().forward(x)["logits"], super().forward(x + 0.1)["logits"]
        logits = F.normalize(left, dim=1) @ F.normalize(right, dim=1).T / 0.2
        return {"loss": F.cross_entropy(logits, torch.arange(len(logits))), "logits": logits}


class Supervised:
    """Supervised contrastive loss: positives are the others of the class."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(x=inputs["x"])
        z = F.normalize(outputs["logits"], dim=1)
        same = inputs["labels"][:, None] == inputs["labels"][None]
        similarity = (z @ z.T / 0.2).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
        loss = -(similarity.log_softmax(1) * same.fill_diagonal_(False)).sum(1).mean()
        return (loss, outputs) if return_outputs else loss


def correlation(outputs, labels, num_items_in_batch=None):
    """A statistic of the batch: no mean over examples."""
    scores, targets = outputs["logits"][:, 0], labels.to(outputs["logits"])
    scores, targets = scores - scores.mean(), targets - targets.mean()
    return 1 - (scores * targets).sum() / (scores.norm() * targets.norm()).clamp(min=1e-6)


def seeded(cls):
    tiny.set_seed(0)
    return cls()


CONTRASTIVE = {
    "compute_loss": (tiny.Mlp, Contrastive, None),
    "the model": (ContrastiveModel, None, None),
    "supervised": (tiny.Mlp, Supervised, None),
    "compute_loss_func": (tiny.Mlp, None, correlation),
}


@of_every_part
@pytest.mark.parametrize(("model", "body", "func"), CONTRASTIVE.values(), ids=CONTRASTIVE)
def test_losses_that_compare_examples_of_a_batch(model, body, func, field, sam, tmp_path):
    def run():
        equivalence.trained(
            SAMConfig(rho=0.05, **sam),
            tmp_path,
            model=lambda: seeded(model),
            body=body,
            extra=lambda model: {"compute_loss_func": func},
        )

    assert_refused(run, rf"\b({field})\b")


@pytest.mark.parametrize(("model", "body", "func"), CONTRASTIVE.values(), ids=CONTRASTIVE)
@pytest.mark.parametrize(("scope", "accumulation"), [("micro", 2), ("device", 2)])
def test_losses_that_compare_examples_in_whole_batches(model, body, func, scope, accumulation, tmp_path):
    runs = equivalence.both(
        tmp_path,
        scope,
        accumulation,
        model=lambda: seeded(model),
        body=body,
        extra=lambda model: {"compute_loss_func": func},
    )
    assert_like_stock(*runs)


# --- what is not refused ------------------------------------------------------------------------------------------


class Noisy(tiny.Mlp):
    """Dropout draws other masks for a part of a batch than for the whole."""

    def __init__(self):
        super().__init__(dropout=0.5)


class Normalised(tiny.Mlp):
    """BatchNorm takes statistics of the part; a loss of parts is still a mean over examples."""

    def __init__(self):
        super().__init__(batch_norm=True)


class OneScale(nn.Module):
    """All losses alike: nothing tells a mean from a sum of one."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, x, labels):
        loss = self.w**2
        return {"loss": loss, "logits": x[:, : tiny.CLASSES] * self.w}


@pytest.mark.parametrize("model", [tiny.Mlp, Noisy, Normalised, OneScale], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("field", "sam"),
    [*PARTS[1:3], ("ascent_fraction", {"method": "subset", "ascent_fraction": 0.5})],
    ids=lambda value: str(value),
)
def test_ordinary_losses_are_taken_in_parts(model, field, sam, tmp_path):
    trainer = equivalence.trained(SAMConfig(rho=0.05, **sam), tmp_path, model=lambda: seeded(model))
    assert len(tiny.logged(trainer, "sam_rho")) == 3


@pytest.mark.parametrize("model", [tiny.bert, tiny.vit, tiny.llama], ids=lambda make: make.__name__)
@pytest.mark.parametrize(("field", "sam"), [PARTS[1], PARTS[4]], ids=lambda value: str(value))
def test_losses_of_transformers_are_taken_in_parts(model, field, sam, tmp_path):
    data = {tiny.bert: tiny.sentences, tiny.vit: tiny.images, tiny.llama: tiny.texts}[model]()
    trainer = equivalence.trained(SAMConfig(rho=0.05, **sam), tmp_path, model=model, data=data)
    assert len(tiny.logged(trainer, "sam_rho")) == 3


@pytest.mark.parametrize(("field", "sam"), PARTS, ids=lambda value: str(value))
def test_a_look_at_the_loss_leaves_no_trace(field, sam, tmp_path):
    """However the loss is found out to be a mean over examples, random numbers, state and log stay the stock Trainer's."""
    if "method" in sam and sam["method"] == "esam":
        sam = {**sam, "gamma": 1.0}
    options = {"model": lambda: seeded(tiny.Mlp), "data": tiny.vectors(), "optim": "sgd", "accumulation": 2}
    ours, stock = equivalence.both(tmp_path, sam=sam, **options)
    torch.testing.assert_close(tiny.flat(ours.model), tiny.flat(stock.model), rtol=1e-5, atol=1e-7)
    assert torch.equal(ours.random_after[0], stock.random_after[0])
    assert [entry.keys() for entry in equivalence.entries(ours)] == [e.keys() for e in equivalence.entries(stock)]
