"""What is refused, feature by feature and engine by engine; the documentation's table is the code's."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, TorchDynamoPlugin
from distributed.traffic import COUNTED
from integration import tiny

from hf_sam import METHODS, SAMConfig, SAMTrainer
from hf_sam.engines import compatibility as refusals
from hf_sam.engines.base import Engine
from hf_sam.engines.compatibility import FIELDS, LACKS, NEEDS
from hf_sam.engines.sharded import FullyShardedEngine, ShardedEngine
from hf_sam.engines.zero import Zero3Engine, ZeroEngine
from hf_sam.methods.base import Descent, Needs

DOCS = Path(__file__).parents[2] / "docs" / "engines.md"
ENGINES = {
    "one process": Engine,
    "DDP": Engine,
    "FSDP2": FullyShardedEngine,
    "tensor parallel": ShardedEngine,
    "ZeRO-0, 1, 2": ZeroEngine,
    "ZeRO-3": Zero3Engine,
}
# Configurations that use a field whose meaning an engine may lack, and what else asks for a need beside methods.
ASKING = {
    "scope='micro'": {"scope": "micro"},
    "scope='device'": {"scope": "device"},
    "scope='global'": {"scope": "global"},
    "weight_decay_in_ascent=True": {"weight_decay_in_ascent": True},
}
OPTIONS = {"second_order=True": {"second_order": True}}
EVERY = {**{name: {"method": name} for name in METHODS}, **OPTIONS, **ASKING}
# Where they are refused; everything else runs on every engine.
SHARDED, ZERO = ("FSDP2", "tensor parallel", "ZeRO-3"), ("ZeRO-0, 1, 2", "ZeRO-3")
BUT_REPLICATED = (*SHARDED, "ZeRO-0, 1, 2")
REFUSED = {
    "gsam": ZERO,
    "wsam": ZERO,
    "looksam": ZERO,
    "msam": ZERO,
    "precond": ZERO,
    "aesam": ZERO,
    "previous": ZERO,
    "functional": SHARDED,
    "random": SHARDED,
    "gcsam": SHARDED,
    "zsharp": SHARDED,
    "bilora": BUT_REPLICATED,
    "flat-lora": BUT_REPLICATED,
    "imbsam": BUT_REPLICATED,
    "second_order=True": BUT_REPLICATED,
    "weight_decay_in_ascent=True": ZERO,
    "scope='micro'": ("FSDP2", "ZeRO-3"),
    "scope='device'": ("FSDP2", "ZeRO-3"),
}


@pytest.fixture
def trainer(tmp_path):
    return SAMTrainer(model=tiny.mlp(), args=tiny.arguments(tmp_path), train_dataset=tiny.vectors())


@pytest.mark.parametrize("kind", LACKS)
def test_what_an_engine_lacks_is_refused_there_and_nowhere_else(trainer, monkeypatch, kind):
    monkeypatch.setattr(refusals, "kind_of", lambda trainer: kind)
    for asked, fields in EVERY.items():
        config = trainer.sam_config = SAMConfig(**fields)
        if kind not in REFUSED.get(asked, ()):
            refusals.refuse_unsupported(trainer)
            continue
        words = asked if asked in FIELDS else f"{config.label} needs "
        with pytest.raises(ValueError, match=f"SAMTrainer: {re.escape(words)}") as error:
            refusals.refuse_unsupported(trainer)
        message = str(error.value)
        assert f"not supported under {kind}: " in message
        reasons = [reason for lack, reason in LACKS[kind].items() if _asks_for(trainer, lack)]
        assert any(message.endswith(reason) for reason in reasons)
        assert re.search(r"\b(Use|Choose)\b", message), "a refusal names the remedy"
        if asked not in FIELDS:
            assert any(f"needs {words}, which is" in message for words in NEEDS.values())


def _asks_for(trainer, lack) -> bool:
    return FIELDS[lack](trainer) if isinstance(lack, str) else bool(trainer.sam_config.parts.needs & lack)


@dataclass(frozen=True)
class Halved(Descent):
    def gradient(self, g, g_s, step):
        return g_s * 0.5


@dataclass(frozen=True)
class HalvedBetween(Descent):
    def between(self, g, step):
        return g * 0.5


@pytest.mark.parametrize("kind", ["ZeRO-0, 1, 2", "ZeRO-3"])
@pytest.mark.parametrize(
    "fields",
    [{"descent": Halved()}, {"descent": HalvedBetween(), "interval": 2}, {"method": "aesam"}],
    ids=["gradient", "between", "aesam"],
)
def test_steps_along_a_gradient_of_the_updates_own_are_refused_where_deepspeed_keeps_gradients(
    trainer, monkeypatch, kind, fields
):
    """What is put into `p.grad` there, DeepSpeed does not step along."""
    monkeypatch.setattr(refusals, "kind_of", lambda trainer: kind)
    trainer.sam_config = SAMConfig(**fields)
    with pytest.raises(ValueError, match=f"not supported under {kind}"):
        refusals.refuse_unsupported(trainer)


def test_every_engine_and_whatever_it_lacks_has_words():
    assert ENGINES.keys() == LACKS.keys()
    assert ASKING.keys() | {"stochastic_rounding=True"} == FIELDS.keys()
    for lacks in LACKS.values():
        assert all(lack in FIELDS if isinstance(lack, str) else lack in NEEDS for lack in lacks)


def test_every_need_is_some_methods_or_options_own():
    for need in NEEDS:
        assert _asked_for_by(need) or any(option in NEEDS[need] for option in OPTIONS)


def test_splitting_micro_batches_asks_for_the_micro_scope(trainer):
    trainer.sam_config = SAMConfig(m=2)
    assert FIELDS["scope='micro'"](trainer)


def auto(kind: str) -> str:
    engine = ENGINES[kind]
    return engine.scope(engine.__new__(engine), SAMConfig())


def _asked_for_by(need: Needs) -> list[str]:
    """The methods, and options of others, that have this need."""
    asking = {**{name: {"method": name} for name in METHODS}, **OPTIONS}
    return [name for name, fields in asking.items() if SAMConfig(**fields).parts.needs & need]


def _row_of(need: Needs) -> str:
    asking = ", ".join(f"`{name}`" for name in _asked_for_by(need) if name not in NEEDS[need])
    words = re.sub(r"\((\w+=\w+)\)", r"(`\1`)", NEEDS[need])
    return f"{words} ({asking})" if asking else words


def matrix() -> list[str]:
    """The documentation's table, from what the code refuses by."""

    def row(label: str, lack: Needs | str) -> str:
        return f"| {label} | " + " | ".join("no" if lack in lacks else "yes" for lacks in LACKS.values()) + " |"

    scopes = [field for field in FIELDS if field.startswith("scope=")]
    return [
        "| | " + " | ".join(LACKS) + " |",
        "|" + "---|" * (len(LACKS) + 1),
        '| `scope="auto"` means | ' + " | ".join(map(auto, LACKS)) + " |",
        *(row(f"`{field}`", field) for field in scopes),
        *(row(_row_of(need), need) for need in NEEDS),
        # stochastic_rounding only in one mixture of parameters, which the text names
        *(row(f"`{field}`", field) for field in FIELDS if field not in (*scopes, "stochastic_rounding=True")),
    ]


def test_documentation_has_the_table_that_the_code_refuses_by():
    table = re.search(r"<!-- matrix -->\n(.*)\n<!-- /matrix -->", DOCS.read_text(), flags=re.DOTALL).group(1)
    assert table.splitlines() == matrix()


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
