"""Which parameters train is asked anew in every step: of a loss module, thawed or frozen by a callback, or new."""

from __future__ import annotations

import copy

import pytest
import torch
from integration import equivalence, tiny
from integration.equivalence import FEWER_PASSES, SETTINGS, assert_like_stock, both
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_sam import SAMConfig

SGD = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}


def double() -> tiny.Mlp:
    return tiny.mlp(torch.float64)


# --- parameters outside the model ---------------------------------------------------------------------------------


class LearnedLoss(nn.Module):
    """A learned temperature and a learned weight for each class (Kendall et al. 2018 weigh tasks so)."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.class_weights = nn.Parameter(torch.tensor([0.1, -0.2, 0.3]))

    def forward(self, logits, labels):
        losses = F.cross_entropy(logits * self.temperature, labels, reduction="none")
        weights = self.class_weights[labels]
        return (losses * torch.exp(-weights) + weights).mean()


class LossOfTheTrainer:
    """A subclass that keeps the loss module as an attribute, and adds a group to the optimizer that the Trainer makes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.learned = LearnedLoss().to(next(self.model.parameters()).dtype)
        self.add_callback(ZeroOutside(self.learned))

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            super().create_optimizer(*args, **kwargs)
            self.optimizer.add_param_group({"params": list(self.learned.parameters()), "weight_decay": 0.0})
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(x=inputs["x"])
        loss = self.learned(outputs["logits"], inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def optimizer_of(*modules, optimizer=torch.optim.SGD):
    return optimizer([p for module in modules for p in module.parameters()], lr=0.1)


def closed_over(model, optimizer=torch.optim.SGD) -> dict:
    """A loss function that is a closure; the optimizer alone knows its parameters."""
    learned = LearnedLoss().to(next(model.parameters()).dtype)

    def compute_loss_func(outputs, labels, num_items_in_batch=None):
        return learned(outputs["logits"], labels) * len(labels) / num_items_in_batch

    return {
        "compute_loss_func": compute_loss_func,
        "optimizers": (optimizer_of(model, learned, optimizer=optimizer), None),
        "callbacks": [ZeroOutside(learned)],
    }


class ZeroOutside(TrainerCallback):
    """The Trainer zeroes the gradients of the model alone; this user zeroes the others, and keeps what they are."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.trajectory: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.module.zero_grad()

    def on_step_end(self, args, state, control, **kwargs):
        self.trajectory.append({name: p.detach().clone() for name, p in self.module.named_parameters()})


def outside(trainer) -> dict[str, torch.Tensor]:
    """The parameters that the optimizer holds and the model does not."""
    inside = {id(p) for p in trainer.model.parameters()}
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"] if id(p) not in inside]
    assert len(parameters) == 2
    return {str(i): p for i, p in enumerate(parameters)}


def run_with_closure(sam, folder, *, optimizer=torch.optim.SGD, model=tiny.mlp, data=None, zeroes=True, **args):
    """`trained`, with the callback that the closure's user needs."""

    def extra(built):
        made = closed_over(built, optimizer)
        kept.append(made.pop("callbacks")[0])
        return made

    kept: list[ZeroOutside] = []
    trainer = equivalence.trainer_for(sam, folder, model=model, data=data, extra=extra, **args)
    if zeroes:
        trainer.add_callback(kept[0])
    trainer.train()
    trainer.random_after = (torch.get_rng_state(),)
    trainer.noted = kept[0]
    return trainer


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_parameters_of_a_closure_step_as_in_the_stock_trainer(optimizer, scope, accumulation, tmp_path):
    options = {"optimizer": optimizer, "gradient_accumulation_steps": accumulation, "max_steps": 4}
    runs = [run_with_closure(sam, tmp_path, **options) for sam in (SAMConfig(rho=1e-30, scope=scope), None)]
    assert_like_stock(*runs, outside)


@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_gradients_outside_that_nobody_zeroes_add_up_as_in_the_stock_trainer(scope, accumulation, tmp_path):
    """The Trainer zeroes those of the model alone, so the others grow from step to step."""
    options = {"zeroes": False, "gradient_accumulation_steps": accumulation, "max_steps": 4}
    runs = [run_with_closure(sam, tmp_path, **options) for sam in (SAMConfig(rho=1e-30, scope=scope), None)]
    for ours, stock in zip(outside(runs[0]).values(), outside(runs[1]).values(), strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.grad, stock.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tiny.flat(runs[0].model), tiny.flat(runs[1].model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", FEWER_PASSES, ids=lambda method: method["method"])
def test_parameters_of_a_closure_step_once_where_there_are_fewer_passes(method, tmp_path):
    optimizer = torch.optim.AdamW if method["method"] == "msam" else torch.optim.SGD
    runs = [
        run_with_closure(sam, tmp_path, optimizer=optimizer, gradient_accumulation_steps=2, max_steps=4)
        for sam in (SAMConfig(rho=1e-30, **method), None)
    ]
    assert_like_stock(*runs, outside, perturbs=False)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_parameters_of_a_loss_module_step_as_in_the_stock_trainer(optim, scope, accumulation, tmp_path):
    assert_like_stock(*both(tmp_path, scope, accumulation, body=LossOfTheTrainer, optim=optim, max_steps=4), outside)


@pytest.mark.parametrize(
    "sam", [{"method": "gsam", "rho_min": 0.0}, {"method": "wsam"}, {"method": "looksam"}], ids=str
)
def test_parameters_of_a_loss_module_under_methods_that_combine_gradients(sam, tmp_path):
    """One step, at a vanishing rho, in which g and g_s are the same: the combinations are g_s, too."""
    ours, stock = both(tmp_path, sam=sam, body=LossOfTheTrainer, max_steps=1, accumulation=2, **SGD)
    for i, p in outside(ours).items():
        torch.testing.assert_close(p, outside(stock)[i], rtol=1e-4, atol=1e-6)


class Together(nn.Module):
    """The model and its loss as one module, for the steps by hand."""

    def __init__(self):
        super().__init__()
        self.model, self.learned = double(), LearnedLoss().double()


@pytest.mark.parametrize(("scope", "accumulation"), [("device", 1), ("micro", 2), ("device", 2)])
def test_parameters_outside_step_along_the_gradient_at_w_plus_eps(scope, accumulation, tmp_path):
    """Whether they are perturbed themselves is left open; that their gradient is g_s is not."""
    data = tiny.vectors(dtype=torch.float64)
    steps = equivalence.windows(equivalence.batches(data, 4), accumulation, 3)
    noted = run_with_closure(
        SAMConfig(rho=0.5, scope=scope),
        tmp_path,
        model=double,
        data=data,
        gradient_accumulation_steps=accumulation,
        **SGD,
    ).noted.trajectory

    def by_hand(is_perturbed):
        expected = equivalence.sgd_steps_by_hand(
            Together(),
            steps,
            rho=0.5,
            lr=0.1,
            scope=scope,
            loss_of=lambda m, batch: m.learned(m.model(batch["x"])["logits"], batch["labels"]),
            is_perturbed=is_perturbed,
        )
        return [{name: step[f"learned.{name}"] for name in noted[0]} for step in expected]

    choices = [by_hand(lambda name: not name.startswith("learned")), by_hand(lambda name: True)]
    errors = []
    for expected in choices:
        try:
            equivalence.assert_close(noted, expected)
        except AssertionError as error:
            errors.append(error)
    assert len(errors) < 2, errors[0]


def test_accumulated_gradients_outside_do_not_turn_the_perturbation(tmp_path):
    """The stock Trainer never zeroes them: what has added up before this step is no part of its g."""
    norms = [
        tiny.logged(
            run_with_closure(SAMConfig(rho=0.5, perturb=["*"]), tmp_path, zeroes=zeroes, max_steps=1, **SGD),
            "sam_perturbation_norm",
        )
        for zeroes in (True, False)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


# --- thawed -------------------------------------------------------------------------------------------------------


class Thaw(TrainerCallback):
    """Gradual unfreezing: `layers` one after the other, from step `at` on."""

    def __init__(self, at: int = 2, layers: tuple[str, ...] = ("first",), adds_group: bool = False):
        self.at, self.layers, self.adds_group = at, layers, adds_group

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        for i, layer in enumerate(self.layers):
            if state.global_step == self.at + i:
                module = model.get_submodule(layer).requires_grad_(True)
                if self.adds_group:
                    optimizer.add_param_group({"params": list(module.parameters()), "lr": 0.1})


def frozen(*layers: str, dtype=torch.float32):
    def make():
        model = tiny.mlp(dtype)
        for layer in layers:
            model.get_submodule(layer).requires_grad_(False)
        return model

    return make


def all_parameters(model, optimizer=torch.optim.SGD) -> dict:
    return {"optimizers": (optimizer(list(model.parameters()), lr=0.1), None)}


def trainable_only(model) -> dict:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    # The Trainer's own scheduler knows the groups there are at the beginning only.
    return {"optimizers": (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0, 0))}


THAWING = {
    "one layer": (("first",), lambda: Thaw(), all_parameters),
    "at the first step": (("first",), lambda: Thaw(at=0), all_parameters),
    "layer by layer": (("first", "norm"), lambda: Thaw(1, ("norm", "first")), all_parameters),
    "a new group": (("first",), lambda: Thaw(adds_group=True), trainable_only),
    "Adam": (("norm",), lambda: Thaw(1, ("norm",)), lambda model: all_parameters(model, torch.optim.AdamW)),
}


@pytest.mark.parametrize(("layers", "thaw", "extra"), THAWING.values(), ids=THAWING)
@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_thawed_layers_step_as_in_the_stock_trainer(layers, thaw, extra, scope, accumulation, tmp_path):
    runs = both(
        tmp_path,
        scope,
        accumulation,
        model=frozen(*layers),
        extra=extra,
        callbacks=lambda: [thaw()],
        max_steps=5,
    )
    assert_like_stock(*runs)
    assert not torch.equal(runs[0].model.get_submodule(layers[0]).weight, tiny.mlp().get_submodule(layers[0]).weight)


@pytest.mark.parametrize("method", FEWER_PASSES, ids=lambda method: method["method"])
@pytest.mark.parametrize("name", ["one layer", "a new group"])
def test_thawed_layers_step_once_where_there_are_fewer_passes(method, name, tmp_path):
    layers, thaw, extra = THAWING[name]
    if method["method"] == "msam":
        extra = lambda model: all_parameters(model, torch.optim.AdamW)  # noqa: E731 - needs a momentum
        thaw = Thaw
    runs = both(
        tmp_path,
        sam=method,
        accumulation=2,
        model=frozen(*layers),
        extra=extra,
        callbacks=lambda: [thaw()],
        max_steps=5,
    )
    assert_like_stock(*runs, perturbs=False)


@pytest.mark.parametrize(("layers", "thaw", "extra"), [*THAWING.values()][:4], ids=[*THAWING][:4])
@pytest.mark.parametrize(("scope", "accumulation"), [("device", 1), ("micro", 2), ("device", 2)])
def test_thawed_layers_are_perturbed_from_then_on(layers, thaw, extra, scope, accumulation, tmp_path):
    data, callback = tiny.vectors(dtype=torch.float64), thaw()
    callback.adds_group = False

    def before_step(step, model):
        callback.on_step_begin(None, type("State", (), {"global_step": step}), None, model=model)

    expected = equivalence.sgd_steps_by_hand(
        frozen(*layers, dtype=torch.float64)(),
        equivalence.windows(equivalence.batches(data, 4)[:8] * 2, accumulation, 5),
        rho=0.5,
        lr=0.1,
        scope=scope,
        before_step=before_step,
    )
    equivalence.assert_steps_as_by_hand(
        tmp_path,
        expected,
        SAMConfig(rho=0.5, scope=scope),
        model=frozen(*layers, dtype=torch.float64),
        data=data,
        extra=extra,
        callbacks=lambda: [thaw()],
        gradient_accumulation_steps=accumulation,
    )


@pytest.mark.parametrize("method", ["friendly", "gsam", "asam", "wsam"])
def test_thawed_layers_under_methods_with_state(method, tmp_path):
    """The average gradient of Friendly SAM knows nothing of a layer before it is thawed."""
    sam = {"method": method, **({"rho_min": 0.0} if method == "gsam" else {})}
    ours, stock = both(
        tmp_path,
        sam=sam,
        model=frozen("first"),
        extra=all_parameters,
        callbacks=lambda: [Thaw()],
        max_steps=5,
        max_grad_norm=0.0,
    )
    for name, p in ours.model.named_parameters():
        torch.testing.assert_close(p, stock.model.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_a_pattern_finds_layers_that_are_thawed_later(tmp_path):
    """`perturb` names a layer that is frozen at first: perturbed once it trains, and no error before."""
    trainer = equivalence.trained(
        SAMConfig(rho=0.5, perturb=["first.*", "last.*"]),
        tmp_path,
        model=frozen("first"),
        extra=all_parameters,
        callbacks=lambda: [Thaw()],
        max_steps=4,
        max_grad_norm=0.0,
    )
    assert tiny.logged(trainer, "sam_perturbation_norm") == pytest.approx([0.5] * 4, rel=1e-4)
    data, model = tiny.vectors(dtype=torch.float64), frozen("first", dtype=torch.float64)()
    callback = Thaw()
    expected = equivalence.sgd_steps_by_hand(
        model,
        equivalence.windows(equivalence.batches(data, 4), 1, 4),
        rho=0.5,
        lr=0.1,
        before_step=lambda step, m: callback.on_step_begin(None, type("S", (), {"global_step": step}), None, model=m),
        is_perturbed=lambda name: name.startswith(("first", "last")),
    )
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p.double(), expected[-1][name], rtol=1e-4, atol=1e-5)


class ReplaceHead(TrainerCallback):
    """A new head in the middle of the run, with a group of its own."""

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == 2:
            head = copy.deepcopy(model.last)
            with torch.no_grad():
                head.weight.mul_(0.5)
            model.last = head
            if optimizer is not None:
                optimizer.add_param_group({"params": list(head.parameters()), "lr": 0.1})


@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_new_layers_step_as_in_the_stock_trainer(scope, accumulation, tmp_path):
    runs = both(tmp_path, scope, accumulation, extra=trainable_only, callbacks=lambda: [ReplaceHead()], max_steps=4)
    assert_like_stock(*runs)


class ResetsHead:
    """A trainer that has a new head from the third step on, as when new classes arrive."""

    how = "in the groups"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_AtStep(2, self.reset))

    def reset(self):
        old = list(self.model.last.parameters())
        torch.manual_seed(5)
        self.model.last = nn.Linear(8, tiny.CLASSES)
        new = dict(zip(old, self.model.last.parameters(), strict=True))
        if self.how == "in the groups":
            for group in self.optimizer.param_groups:
                group["params"] = [new.get(p, p) for p in group["params"]]
        elif self.how == "in another optimizer":
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2)


class _AtStep(TrainerCallback):
    def __init__(self, at: int, act):
        self.at, self.act = at, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            self.act()


class ResetsHeadAndOptimizer(ResetsHead):
    how = "in another optimizer"


class ResetsHeadOnly(ResetsHead):
    """The optimizer does not know the new head, whose gradient still counts where gradients are clipped."""

    how = "in the model alone"


@pytest.mark.parametrize("body", [ResetsHead, ResetsHeadAndOptimizer, ResetsHeadOnly], ids=lambda body: body.how)
@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_a_new_head_steps_as_in_the_stock_trainer(body, scope, accumulation, tmp_path):
    runs = both(tmp_path, scope, accumulation, body=body, max_steps=4, optim="sgd", learning_rate=0.1)
    assert_like_stock(*runs)


@pytest.mark.parametrize("body", [ResetsHead, ResetsHeadAndOptimizer], ids=lambda body: body.how)
def test_a_new_head_that_the_optimizer_knows_is_perturbed(body, tmp_path):
    trainer = equivalence.trained(SAMConfig(rho=0.5), tmp_path, body=body, max_steps=4)
    assert set(trainer.model.last.parameters()) <= set(trainer._sam.parameters.selected)


def test_new_layers_are_perturbed(tmp_path):
    data, callback = tiny.vectors(dtype=torch.float64), ReplaceHead()
    expected = equivalence.sgd_steps_by_hand(
        double(),
        equivalence.windows(equivalence.batches(data, 4), 1, 4),
        rho=0.5,
        lr=0.1,
        before_step=lambda step, m: callback.on_step_begin(None, type("S", (), {"global_step": step}), None, model=m),
    )
    equivalence.assert_steps_as_by_hand(
        tmp_path,
        expected,
        SAMConfig(rho=0.5),
        model=double,
        data=data,
        extra=trainable_only,
        callbacks=lambda: [ReplaceHead()],
    )


# --- frozen -------------------------------------------------------------------------------------------------------


class Alternating:
    """Trains one layer in even steps and the other in odd ones, and says so in the loss, as adversarial pairs do."""

    def compute_loss(self, *args, **kwargs):
        is_even = self.state.global_step % 2 == 0
        self.model.first.requires_grad_(is_even)
        self.model.last.requires_grad_(not is_even)
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize("perturb", ["all", "first*"])
@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_layers_that_the_loss_freezes_and_thaws(scope, accumulation, perturb, tmp_path):
    sam = {"scope": scope, "perturb": perturb}
    runs = both(tmp_path, scope, accumulation, sam=sam, body=Alternating, max_steps=5)
    assert_like_stock(*runs, perturbs=False)


class Freeze(TrainerCallback):
    """Freezes `layers` at the start of step `at`, and notes what is frozen at every moment it is called."""

    def __init__(self, layers: tuple[str, ...], at: int = 2, until: int | None = None):
        self.layers, self.at, self.until = layers, at, until
        self.were_thawed: list[str] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step in (self.at, self.until):
            for layer in self.layers:
                model.get_submodule(layer).requires_grad_(state.global_step == self.until)
        self.look(state, model)

    def look(self, state, model):
        if self.at <= state.global_step and (self.until is None or state.global_step < self.until):
            parameters = [(n, p) for layer in self.layers for n, p in model.get_submodule(layer).named_parameters()]
            self.were_thawed += [name for name, p in parameters if p.requires_grad or p.grad is not None]

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.look(state, model)

    on_pre_optimizer_step = on_substep_end


PERTURBING = {
    "all": {},
    "a pattern that selects it": {"perturb": ["first.*"]},
    "a pattern that leaves it out": {"perturb": ["last.*"]},
    "norm": {"perturb": "norm"},
    "norm-only": {"method": "norm-only"},
    "no-norm-no-bias": {"perturb": "no-norm-no-bias"},
}


@pytest.mark.parametrize("perturb", PERTURBING.values(), ids=PERTURBING)
@pytest.mark.parametrize("layers", [("first",), ("norm",)], ids=lambda layers: layers[0])
@pytest.mark.parametrize(("scope", "accumulation"), SETTINGS)
def test_frozen_layers_stay_frozen(perturb, layers, scope, accumulation, tmp_path):
    made: list[Freeze] = []

    def callbacks():
        made.append(Freeze(layers))
        return made[-1:]

    sam = {"scope": scope, **perturb}
    runs = both(tmp_path, accumulation=accumulation, sam=sam, callbacks=callbacks, max_steps=5, weight_decay=0.1)
    assert_like_stock(*runs, perturbs=False)
    assert made[0].were_thawed == []
    assert not any(p.requires_grad for p in runs[0].model.get_submodule(layers[0]).parameters())


@pytest.mark.parametrize("sam", [{"perturb": ["last.*"]}, {"perturb": "norm"}, {}], ids=str)
@pytest.mark.parametrize(("scope", "accumulation"), [("device", 1), ("micro", 2), ("device", 2)])
def test_steps_after_a_layer_is_frozen(sam, scope, accumulation, tmp_path):
    """Frozen for two steps in the middle of the run; at an ordinary rho, by hand."""
    data, freeze = tiny.vectors(dtype=torch.float64), Freeze(("first",), at=1, until=3)
    pattern = {"norm": "norm", "None": ""}.get(str(sam.get("perturb")), "last")
    expected = equivalence.sgd_steps_by_hand(
        double(),
        equivalence.windows(equivalence.batches(data, 4)[:8] * 2, accumulation, 4),
        rho=0.5,
        lr=0.1,
        scope=scope,
        before_step=lambda step, m: freeze.on_step_begin(None, type("S", (), {"global_step": step}), None, model=m),
        is_perturbed=lambda name: name.startswith(pattern),
    )
    equivalence.assert_steps_as_by_hand(
        tmp_path,
        expected,
        SAMConfig(rho=0.5, scope=scope, **sam),
        model=double,
        data=data,
        callbacks=lambda: [Freeze(("first",), at=1, until=3)],
        gradient_accumulation_steps=accumulation,
    )


@pytest.mark.parametrize("method", [*FEWER_PASSES, {"method": "esam"}, {"method": "subset"}], ids=lambda m: m["method"])
def test_frozen_layers_stay_frozen_under_other_methods(method, tmp_path):
    made: list[Freeze] = []

    def callbacks():
        made.append(Freeze(("first",), at=2))
        return made[-1:]

    trainer = equivalence.trained(SAMConfig(rho=0.5, **method), tmp_path, callbacks=callbacks, max_steps=5)
    assert made[0].were_thawed == []
    early = equivalence.trained(SAMConfig(rho=0.5, **method), tmp_path, max_steps=2)
    assert torch.equal(trainer.model.first.weight, early.model.first.weight)
    assert not torch.equal(trainer.model.last.weight, early.model.last.weight)


def test_everything_that_is_perturbed_is_frozen(tmp_path):
    """Nothing is left to perturb: from then on the run is the stock Trainer's, without an error."""
    made = both(
        tmp_path,
        sam={"perturb": ["first.*"]},
        callbacks=lambda: [Freeze(("first",), at=0)],
        max_steps=4,
        accumulation=2,
    )
    assert_like_stock(*made, perturbs=False)
