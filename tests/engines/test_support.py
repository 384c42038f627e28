"""What is refused, feature by feature and engine by engine; the documentation's table is the code's."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, TorchDynamoPlugin
from distributed.traffic import COUNTED
from integration import tiny

from hf_sam import SAMConfig, SAMTrainer
from hf_sam.engines import compatibility as refusals
from hf_sam.engines.base import Engine, ShardedEngine, Zero3Engine
from hf_sam.engines.compatibility import FEATURES, LACKS

DOCS = Path(__file__).parents[2] / "docs" / "engines.md"
# A configuration that asks for each feature.
ASKING = {
    "scope='micro'": {"scope": "micro"},
    "scope='device'": {"scope": "device"},
    "scope='global'": {"scope": "global"},
    "method='gsam', 'wsam', 'looksam'": {"method": "wsam"},
    "method='esam'": {"method": "esam"},
    "method='functional'": {"method": "functional"},
    "method='friendly', 'carried'": {"method": "friendly"},
    "method='previous'": {"method": "previous"},
    "method='msam'": {"method": "msam"},
    "method='random'": {"method": "random"},
    "method='bilora'": {"method": "bilora"},
    "second_order=True": {"second_order": True},
    "weight_decay_in_ascent=True": {"weight_decay_in_ascent": True},
}


@pytest.fixture
def trainer(tmp_path):
    return SAMTrainer(model=tiny.mlp(), args=tiny.arguments(tmp_path), train_dataset=tiny.vectors())


@pytest.mark.parametrize("kind", LACKS)
def test_a_feature_is_refused_on_the_engines_that_lack_it_and_nowhere_else(trainer, monkeypatch, kind):
    monkeypatch.setattr(refusals, "kind_of", lambda trainer: kind)
    for feature, fields in ASKING.items():
        trainer.sam_config = SAMConfig(**fields)
        if feature not in LACKS[kind]:
            refusals.refuse_unsupported(trainer)
            continue
        with pytest.raises(ValueError, match=re.escape(f"{feature} is not supported under {kind}: ")) as error:
            refusals.refuse_unsupported(trainer)
        assert LACKS[kind][feature] in str(error.value)
        assert re.search(r"\b(Use|Choose)\b", str(error.value)), "a refusal names the remedy"


def test_rows_of_the_table_are_features_that_exist():
    assert ASKING.keys() | {"stochastic_rounding=True"} == FEATURES.keys()
    assert all(lacks.keys() <= FEATURES.keys() for lacks in LACKS.values())


def test_splitting_micro_batches_asks_for_the_micro_scope(trainer):
    trainer.sam_config = SAMConfig(m=2)
    assert FEATURES["scope='micro'"](trainer)


def auto(kind: str) -> str:
    engine = {"FSDP2": ShardedEngine, "tensor parallel": ShardedEngine, "ZeRO-3": Zero3Engine}.get(kind, Engine)
    return engine.scope(engine.__new__(engine), SAMConfig())


def test_documentation_has_the_table_that_the_code_refuses_by():
    lines = [
        "| | " + " | ".join(LACKS) + " |",
        "|" + "---|" * (len(LACKS) + 1),
        '| `scope="auto"` means | ' + " | ".join(map(auto, LACKS)) + " |",
    ]
    for feature in FEATURES:
        cells = ["no" if feature in lacks else "yes" for lacks in LACKS.values()]
        if feature != "stochastic_rounding=True":  # only in one mixture of parameters, which the text names
            lines.append(f"| `{feature}` | " + " | ".join(cells) + " |")
    table = re.search(r"<!-- matrix -->\n(.*)\n<!-- /matrix -->", DOCS.read_text(), flags=re.DOTALL).group(1)
    assert table.splitlines() == lines


def test_documentation_has_the_bytes_that_the_engines_tests_count():
    lines = [
        "| gathered + reduced | stock Trainer | `micro` | `device` | `global` |",
        "|---|---|---|---|---|",
    ]
    for engine, by_scope in COUNTED.items():
        cells = [
            "{:g} + {:g}".format(*by_scope[s]) if s in by_scope else "" for s in (None, "micro", "device", "global")
        ]
        lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    table = re.search(r"<!-- bytes -->\n(.*)\n<!-- /bytes -->", DOCS.read_text(), flags=re.DOTALL).group(1)
    assert table.splitlines() == lines


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload_optimizer"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized"),
        ({"fp16": {"enabled": True}}, "Use bf16"),
        ({"torch_autocast": {"enabled": True}}, "Use bf16"),
    ],
)
def test_settings_of_deepspeed_that_a_second_pass_would_not_see_are_refused(trainer, monkeypatch, sections, words):
    monkeypatch.setattr(refusals, "_deepspeed_config", lambda trainer: sections)
    with pytest.raises(ValueError, match=words):
        refusals.refuse_unsupported(trainer)


def test_settings_of_deepspeed_that_are_fine_are_not_refused(trainer, monkeypatch):
    sections = {"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}, "bf16": {"enabled": True}}
    monkeypatch.setattr(refusals, "_deepspeed_config", lambda trainer: {**sections, "fp16": {"enabled": "auto"}})
    refusals.refuse_unsupported(trainer)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"fsdp_cpu_offload": True}, "offloaded to the CPU"), ({"pp_size": 2}, "pipeline"), ({"ep_size": 2}, "expert")],
)
def test_models_loaded_in_ways_that_are_not_supported_are_refused(trainer, settings, words):
    loaded = {"fsdp_cpu_offload": False, "pp_size": 1, "ep_size": 1, **settings}
    trainer.model.config = SimpleNamespace(distributed_config=SimpleNamespace(**loaded))
    with pytest.raises(ValueError, match=words):
        refusals.refuse_unsupported(trainer)


@pytest.mark.parametrize(
    ("backend", "mode", "device", "is_refused"),
    [
        ("inductor", "reduce-overhead", "cuda", True),
        ("inductor", "max-autotune", "cuda", True),
        ("cudagraphs", "default", "cuda", True),
        ("inductor", "default", "cuda", False),
        ("inductor", "max-autotune-no-cudagraphs", "cuda", False),
        ("no", "reduce-overhead", "cuda", False),
        ("inductor", "reduce-overhead", "cpu", False),
    ],
)
def test_models_compiled_into_cuda_graphs_are_refused(trainer, monkeypatch, backend, mode, device, is_refused):
    plugin = TorchDynamoPlugin(backend=backend, mode=mode)
    monkeypatch.setitem(AcceleratorState._shared_state, "dynamo_plugin", plugin)
    monkeypatch.setattr(type(trainer.args), "device", torch.device(device))
    with pytest.raises(ValueError, match="CUDA graphs") if is_refused else contextlib.nullcontext():
        refusals.refuse_unsupported(trainer)


@pytest.mark.parametrize(
    ("distributed_type", "words"),
    [(DistributedType.MEGATRON_LM, "is not supported"), (DistributedType.FSDP, "fsdp_version: 2")],
)
def test_other_engines_are_refused(trainer, distributed_type, words):
    state = SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=None)
    trainer.accelerator = SimpleNamespace(
        distributed_type=distributed_type, is_fsdp2=False, num_processes=2, parallelism_config=None, state=state
    )
    with pytest.raises(ValueError, match=words):
        refusals.refuse_unsupported(trainer)
