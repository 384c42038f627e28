"""Every method on two processes: ranks agree bitwise, `global` is the one-process run, `device` the mean of the ranks'."""

import subprocess
import sys
from pathlib import Path

import oracles
import pytest
import torch
import torch.nn.functional as F
from methods import worker as methods_worker
from models import examples, stack, tiny_classifier

from hf_sam import SAMConfig

LR = 0.1


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    worker = str(Path(methods_worker.__file__))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, worker, str(folder)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("scope", ["device", "global"])
@pytest.mark.parametrize("name", methods_worker.CONFIGS)
def test_ranks_hold_the_same_weights_after_every_step(ranks, name, scope):
    assert torch.equal(ranks[0][name, scope], ranks[1][name, scope])


@pytest.mark.parametrize("name", [name for name in methods_worker.CONFIGS if name != "esam"])  # which picks per device
def test_global_scope_is_the_run_on_one_process(ranks, name, tmp_path):
    config = SAMConfig(**methods_worker.CONFIGS[name], scope="global")
    alone = methods_worker.train(tmp_path, config, batch_size=8)
    torch.testing.assert_close(ranks[0][name, "global"], alone, rtol=0, atol=1e-12)


def functional(loss, w, batch):
    logits = oracles.loss_function(tiny_classifier(), batch, part="logits")
    return oracles.functional(loss, logits, lambda z: F.cross_entropy(z, batch["labels"]), w, 0.2)


STEPS = {
    "sam": lambda loss, w, step, state, batch: oracles.sam(loss, w, 0.2),
    "asam": lambda loss, w, step, state, batch: oracles.asam(loss, w, 0.5, 0.01),
    "gsam": lambda loss, w, step, state, batch: oracles.gsam(loss, w, 0.2, 0.4),
    "wsam": lambda loss, w, step, state, batch: oracles.wsam(loss, w, 0.2, 0.9),
    "friendly": lambda loss, w, step, state, batch: oracles.friendly(loss, w, 0.2, 0.8, 0.6, state),
    "looksam": lambda loss, w, step, state, batch: oracles.looksam(loss, w, 0.2, 0.7, 3, step, state),
    "functional": lambda loss, w, step, state, batch: functional(loss, w, batch),
    "second_order": lambda loss, w, step, state, batch: oracles.second_order(loss, w, 0.2),
}


@pytest.mark.parametrize("name", STEPS)
def test_device_scope_is_the_mean_of_each_ranks_own_update(ranks, name):
    batches = [stack(examples(8)[:4]), stack(examples(8)[4:])]
    losses, states = [oracles.loss_function(tiny_classifier(), batch) for batch in batches], [{}, {}]
    w = oracles.flatten(oracles.used_parameters(tiny_classifier()))
    for step in range(methods_worker.STEPS):
        own = [STEPS[name](loss, w, step, s, b) for loss, s, b in zip(losses, states, batches, strict=True)]
        w = w - LR * (own[0] + own[1]) / 2
        torch.testing.assert_close(
            ranks[0][name, "device"][step], w, rtol=0, atol=1e-9 if name == "second_order" else 1e-12
        )


@pytest.mark.parametrize("name", ["friendly", "looksam"])
def test_each_ranks_state_is_its_own_and_survives_a_checkpoint(ranks, name):
    for rank in ranks:
        assert torch.equal(rank[name, "resumed"], rank[name, "device"][2:])
