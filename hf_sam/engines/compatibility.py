"""Raise errors for unsupported setups before training starts, with an alternative in the message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn
from torch._dynamo.eval_frame import innermost_backend
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from ..methods.base import Needs
from .kinds import kind_of

if TYPE_CHECKING:
    from transformers import Trainer

# Optimizers of `TrainingArguments.optim` that step inside `backward`, so that the clean pass would change the weights.
STEPS_IN_BACKWARD = ("lomo", "adalomo")
# Trainers whose batches stack chosen and rejected answers, so that part of a batch is not a valid batch.
STACKS_PAIRS = ("DPOTrainer", "KTOTrainer", "RewardTrainer", "ORPOTrainer", "CPOTrainer", "BCOTrainer")
# Trainers that generate completions in every training step.
GENERATES = (
    "GRPOTrainer",
    "NashMDTrainer",
    "OnlineDPOTrainer",
    "PPOTrainer",
    "RLOOTrainer",
    "XPOTrainer",
)
# Distillation trainers that generate for a fraction `lmbda` of the batches.
MAY_GENERATE = ("GKDTrainer", "GOLDTrainer", "MiniLLMTrainer")
# `torch.compile` modes that replay CUDA graphs on a GPU.
REPLAYS_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")

# --- on any engine ---------------------------------------------------------------------------------------------------


def _steps_in_backward(trainer: Trainer) -> bool:
    optimizer = type(trainer.optimizer).__name__.lower() if trainer.optimizer is not None else ""
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    return optim in STEPS_IN_BACKWARD or optim.endswith("layerwise") or optimizer in STEPS_IN_BACKWARD


def _static_graph_meets_two_passes(trainer: Trainer) -> bool:
    config, args = trainer.sam_config, trainer.args
    is_same_graph_and_synced = config.scope == "global" and config.perturb == "all"
    return bool(args.ddp_static_graph) and args.world_size > 1 and not is_same_graph_and_synced


def _parts_of_pairs(trainer: Trainer) -> bool:
    config = trainer.sam_config
    takes_parts = config.m is not None or (config.ascent_fraction or 1) < 1 or config.parts.needs & Needs.SUBSET
    bases = {base.__name__ for base in type(trainer).__mro__}
    return takes_parts and (not trainer.sam_splits_batches or not bases.isdisjoint(STACKS_PAIRS))


def _replays_cuda_graphs(trainer: Trainer) -> bool:
    if trainer.args.device.type != "cuda":
        return False
    if any(map(_is_compiled_to_cuda_graphs, trainer.model.modules())):
        return True
    compiler = getattr(trainer.accelerator.state, "dynamo_plugin", None)
    backend = "" if compiler is None else str(compiler.backend.value).lower()
    return backend == "cudagraphs" or (backend == "inductor" and compiler.mode in REPLAYS_CUDA_GRAPHS)


def _is_compiled_to_cuda_graphs(module: nn.Module) -> bool:
    """Whether the user compiled the module to CUDA graphs, such as `torch.compile(model, mode="reduce-overhead")`."""
    for compiled in (module, getattr(module, "_compiled_call_impl", None)):
        config = compiled.get_compiler_config() if hasattr(compiled, "get_compiler_config") else None
        if (config and config.get("triton.cudagraphs")) or _backend_of(compiled) == "cudagraphs":
            return True
    return False


def _backend_of(compiled: Any) -> str | None:
    """The name of the backend of a compiled module or function, if it is not inductor."""
    context = getattr(compiled, "dynamo_ctx", None)
    cells = getattr(compiled, "__closure__", None) or ()
    callback = context.callback if context is not None else next((c.cell_contents for c in cells), None)
    if not hasattr(callback, "_torchdynamo_orig_backend"):
        return None
    return getattr(innermost_backend(callback), "compiler_name", None)


def _generates(trainer: Trainer) -> bool:
    bases = {base.__name__ for base in type(trainer).__mro__}
    answers_itself = not bases.isdisjoint(MAY_GENERATE) and getattr(trainer.args, "lmbda", 1.0) > 0
    return hasattr(trainer, "_buffered_inputs") or not bases.isdisjoint(GENERATES) or answers_itself


def _splits_sequences(trainer: Trainer) -> bool:
    parallelism = trainer.accelerator.parallelism_config
    return parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled)


def _splits_layers_or_experts(trainer: Trainer) -> bool:
    config = getattr(getattr(trainer.model, "config", None), "distributed_config", None)
    if config is None:
        return False
    sizes = [getattr(config, name, None) or 1 for name in ("pp_size", "ep_size")]  # ep_size is new in transformers 5.19
    return max(sizes) > 1 or bool(getattr(config, "enable_expert_parallel", False))


def _offloads(trainer: Trainer) -> bool:
    config = getattr(getattr(trainer.model, "config", None), "distributed_config", None)
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    offloads_at_load = config is not None and config.fsdp_cpu_offload
    return offloads_at_load or isinstance(getattr(plugin, "cpu_offload", None), CPUOffloadPolicy)


def _deepspeed_config(trainer: Trainer) -> dict:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return {} if plugin is None else plugin.deepspeed_config


def _deepspeed_keeps_weights_elsewhere(trainer: Trainer) -> bool:
    config = _deepspeed_config(trainer)
    zero = config.get("zero_optimization", {})
    offloads = any(
        (zero.get(f"offload_{what}") or {}).get("device", "none") != "none" for what in ("optimizer", "param")
    )
    copies = ("zero_hpz_partition_size", "mics_shard_size")
    has_copies = any(zero.get(name, 0) > 1 for name in copies)
    quantizes = any(zero.get(f"zero_quantized_{what}") for what in ("weights", "gradients"))
    return (
        offloads or has_copies or quantizes or "zenflow" in zero or config.get("compile", {}).get("deepcompile", False)
    )


def _deepspeed_casts(trainer: Trainer) -> bool:
    config = _deepspeed_config(trainer)
    return any(config.get(section, {}).get("enabled") is True for section in ("fp16", "torch_autocast", "amp"))


# Conditions on the trainer that are not supported on any engine, and the messages.
_ALWAYS: list[tuple[Callable[[Trainer], bool], str]] = [
    (
        _generates,
        "{trainer.__class__.__name__} generates its inputs inside the training step, so a second pass would see different "
        "ones. Use a trainer with a fixed batch, such as SFTTrainer or DPOTrainer.",
    ),
    (
        _parts_of_pairs,
        "m, ascent_fraction and method='esam' split batches, but {trainer.__class__.__name__} stacks pairs of "
        "answers in one batch, which cannot be split. Leave them out.",
    ),
    (
        _static_graph_meets_two_passes,
        "ddp_static_graph=True requires all backward passes to be identical and synchronised. Set ddp_static_graph=False, or "
        "use scope='global' with perturb='all'.",
    ),
    (
        _steps_in_backward,
        "optim={trainer.args.optim.value} steps inside backward, so the first pass would already change the weights. "
        "Choose an optimizer that steps on `.grad`, such as adamw_torch or sgd.",
    ),
    (
        _replays_cuda_graphs,
        "the model is compiled into CUDA graphs (torch_compile_mode='reduce-overhead' or 'max-autotune'): the second pass would "
        "overwrite the memory of the first pass's gradients, where the update keeps the weights. Use "
        "torch_compile_mode='default' or 'max-autotune-no-cudagraphs'.",
    ),
    (
        lambda trainer: trainer.args.n_gpu > 1,
        "{trainer.args.n_gpu} GPUs in one process (DataParallel) are not supported: the model is replicated in every forward "
        "pass. Start one process per GPU with `accelerate launch` or `torchrun`, or select one GPU with CUDA_VISIBLE_DEVICES=0.",
    ),
    (
        lambda trainer: kind_of(trainer) == "FSDP1",
        "FSDP version 1 is not supported: it flattens parameters, so their norms cannot be computed and none can be selected. "
        "Set `fsdp_version: 2` in the accelerate configuration.",
    ),
    (
        lambda trainer: kind_of(trainer) == "unknown",
        "{trainer.accelerator.distributed_type} is not supported. Use one process, DDP, FSDP2 or DeepSpeed ZeRO.",
    ),
    (
        _deepspeed_keeps_weights_elsewhere,
        "DeepSpeed's offload_optimizer, offload_param, zero_hpz_partition_size, mics_shard_size, zero_quantized_*, zenflow and "
        "deepcompile are not supported: they store or move weights and gradients where a second pass would not see them. Remove them "
        "from the DeepSpeed configuration; to save memory, use a higher ZeRO stage or fewer trainable parameters (LoRA).",
    ),
    (
        _deepspeed_casts,
        "DeepSpeed's fp16, amp and torch_autocast sections are not supported: they scale losses or cast inside DeepSpeed's "
        "engine, which the first pass bypasses. Use bf16.",
    ),
    (
        _splits_sequences,
        "context and sequence parallelism are not supported: they split the batch in place during the first pass, so the second "
        "would see only part of it. Use FSDP2 or tensor parallelism without them.",
    ),
    (
        _splits_layers_or_experts,
        "pipeline and expert parallelism (pp_size, ep_size > 1) are not supported: each rank holds different parameters, and "
        "norms over them are not implemented. Use fsdp_size, dp_replicate_size and tp_size.",
    ),
    (
        _offloads,
        "parameters offloaded to the CPU are not supported: their gradients reach the CPU only after the pass that computed "
        "them. Turn offloading off; to save memory, shard over more devices or train fewer parameters (LoRA).",
    ),
]

# --- by engine -------------------------------------------------------------------------------------------------------


def _mixes_whole_and_sharded(trainer: Trainer) -> bool:
    return len({isinstance(p, DTensor) for p in trainer.model.parameters() if p.requires_grad}) > 1


# Descriptions of needs, for messages and for the rows of the table in the documentation.
NEEDS: Mapping[Needs, str] = MappingProxyType(
    {
        Needs.CLEAN_GRADIENT: "the clean gradient in addition to the perturbed one",
        Needs.SUBSET: "the loss of each example",
        Needs.LOGITS: "the derivative with respect to the logits",
        Needs.STEP_GRADIENT: "the gradient that the optimizer steps along",
        Needs.OPTIMIZER_STATE: "the optimizer's state",
        Needs.NOISE: "independent noise on every rank",
        Needs.ATTACHMENT: "extra modules attached to the model",
        Needs.OWN_GRADIENT: "the optimizer to step along a gradient that the method builds",
        Needs.UNEVEN_PASSES: "a number of passes that differs between ranks",
        Needs.WHOLE_TENSORS: "statistics of whole tensors",
        Needs.HVP: "a Hessian-vector product (second_order=True)",
    }
)
# Settings that need support by the engine, whatever the method.
FIELDS: Mapping[str, Callable[[Trainer], bool]] = MappingProxyType(
    {
        "scope='micro'": lambda trainer: trainer.sam_config.scope == "micro" or trainer.sam_config.m is not None,
        "scope='device'": lambda trainer: trainer.sam_config.scope == "device",
        "scope='global'": lambda trainer: trainer.sam_config.scope == "global",
        "weight_decay_in_ascent=True": lambda trainer: bool(trainer.sam_config.weight_decay_in_ascent),
        "stochastic_rounding=True": lambda trainer: (
            bool(trainer.sam_config.stochastic_rounding) and _mixes_whole_and_sharded(trainer)
        ),
    }
)
_DEFERRED = (
    "FSDP2 does not expose unsynchronised gradients, so only the gradient of the whole batch is available. Choose "
    "scope='global' (or 'auto')."
)
_SHARDED: dict[Needs | str, str] = {
    Needs.ATTACHMENT: "these modules would have to be sharded like the model. Use one process or DDP.",
    Needs.LOGITS: "it would end the engine's backward pass before it starts. Use one process or DDP.",
    Needs.NOISE: "every process would draw the same noise for its own shard. Use one process or DDP.",
    Needs.UNEVEN_PASSES: "processes would deadlock waiting for each other's shards. Use one process or DDP.",
    Needs.WHOLE_TENSORS: "each process holds only part of every tensor. Use one process or DDP.",
    Needs.HVP: "it cannot be computed through sharded parameters. Use one process or DDP.",
    "stochastic_rounding=True": (
        "some trainable parameters are sharded and others replicated, and the replicas would round differently. Leave it "
        "out, or keep the replicated parameters in float32 if they are few."
    ),
}
_COMBINED = "DeepSpeed keeps gradients in its own buffers, spread over ranks. Use DDP or FSDP2."
_FLAT = "DeepSpeed keeps the optimizer's parameter groups and states in flat buffers. Use DDP or FSDP2."
_ZERO: dict[Needs | str, str] = {
    Needs.CLEAN_GRADIENT: _COMBINED,
    Needs.STEP_GRADIENT: _COMBINED,
    Needs.OWN_GRADIENT: _COMBINED,
    Needs.UNEVEN_PASSES: _COMBINED,
    Needs.HVP: _COMBINED,
    Needs.OPTIMIZER_STATE: _FLAT,
    Needs.ATTACHMENT: _FLAT,
    "weight_decay_in_ascent=True": _FLAT,
}
_ZERO3 = (
    "ZeRO-3 reduces every gradient, so only that of the whole batch is available. Choose scope='global' (or 'auto')."
)
# The needs and settings that each engine does not support, and the messages.
LACKS: Mapping[str, Mapping[Needs | str, str]] = MappingProxyType(
    {
        "one process": {},
        "DDP": {},
        "FSDP2": {"scope='micro'": _DEFERRED, "scope='device'": _DEFERRED, **_SHARDED},
        "tensor parallel": _SHARDED,
        "ZeRO-0, 1, 2": _ZERO,
        "ZeRO-3": {"scope='micro'": _ZERO3, "scope='device'": _ZERO3, **_SHARDED, **_ZERO},
    }
)


def refuse_unsupported(trainer: Trainer) -> None:
    """Raise an error before training starts if the update would be wrong in this setup.

    Raises:
        ValueError: The setup is not supported; the message says why and what to use instead.
    """
    for applies, reason in _ALWAYS:
        if applies(trainer):
            raise ValueError("SAMTrainer: " + reason.format(trainer=trainer))
    if names := [name for name, p in trainer.model.named_parameters() if p.requires_grad and p.is_complex()]:
        raise ValueError(
            f"SAMTrainer: complex parameters are not supported, and this model trains {', '.join(names[:3])}. Store their real "
            "view (`torch.view_as_real`) instead, or freeze them."
        )
    kind, config = kind_of(trainer), trainer.sam_config
    for lack, reason in LACKS[kind].items():
        if isinstance(lack, str) and FIELDS[lack](trainer):
            raise ValueError(f"SAMTrainer: {lack} is not supported under {kind}: {reason}")
        if isinstance(lack, Needs) and config.parts.needs & lack:
            raise ValueError(
                f"SAMTrainer: {config.label} needs {NEEDS[lack]}, which is not supported under {kind}: {reason}"
            )
