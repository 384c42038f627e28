"""PEFT's kinds of adapters under two passes with a vanishing perturbation: bitwise the stock trainer's run."""

from __future__ import annotations

import peft
import pytest
from transformers import TrainerCallback
from zoo import kit
from zoo.architectures import ZOO

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
LAYERS = {"target_modules": ["q_proj", "v_proj"]}
CAUSAL = {"task_type": "CAUSAL_LM"}
LORA = {**LAYERS, **CAUSAL, "r": 2, "lora_dropout": 0.1}
VIRTUAL = {**CAUSAL, "num_virtual_tokens": 3}

# By kind: the configuration's class and its arguments.
ADAPTERS = {
    "LoRA": ("LoraConfig", LORA),
    "LoRA, both random": ("LoraConfig", {**LORA, "init_lora_weights": False}),
    "LoRA, PiSSA": ("LoraConfig", {**LORA, "init_lora_weights": "pissa", "lora_dropout": 0.0}),
    "LoRA, OLoRA": ("LoraConfig", {**LORA, "init_lora_weights": "olora", "lora_dropout": 0.0}),
    "LoRA, embeddings too": ("LoraConfig", {**LORA, "target_modules": ["embed_tokens", "q_proj"]}),
    "LoRA, all linear layers, biases": ("LoraConfig", {**LORA, "target_modules": "all-linear", "lora_bias": True}),
    "LoRA, layers replicated": ("LoraConfig", {**LORA, "layer_replication": [[0, 2], [1, 2]]}),
    "LoRA, parameters of experts": (
        "LoraConfig",
        {**CAUSAL, "r": 2, "target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    "LoRA, modules to save": ("LoraConfig", {**LORA, "modules_to_save": ["lm_head"]}),
    "LoRA, trainable tokens": ("LoraConfig", {**LORA, "trainable_token_indices": [4, 5, 6]}),
    "DoRA": ("LoraConfig", {**LORA, "use_dora": True}),
    "rsLoRA": ("LoraConfig", {**LORA, "use_rslora": True}),
    "AdaLoRA": (
        "AdaLoraConfig",
        {**LAYERS, **CAUSAL, "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 5},
    ),
    "IA3": ("IA3Config", {**CAUSAL, "target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "LoHa": ("LoHaConfig", {**LAYERS, **CAUSAL, "r": 2, "rank_dropout": 0.2, "module_dropout": 0.2}),
    "LoKr": ("LoKrConfig", {**LAYERS, **CAUSAL, "r": 2, "rank_dropout": 0.2, "module_dropout": 0.2}),
    "VeRA": ("VeraConfig", {"target_modules": ["q_proj"], **CAUSAL, "r": 4, "vera_dropout": 0.1}),
    "RandLoRA": ("RandLoraConfig", {"target_modules": ["q_proj"], **CAUSAL, "r": 4, "randlora_dropout": 0.1}),
    "VB-LoRA": (
        "VBLoRAConfig",
        {"target_modules": ["q_proj"], **CAUSAL, "r": 2, "num_vectors": 8, "vector_length": 8, "vblora_dropout": 0.1},
    ),
    "FourierFT": ("FourierFTConfig", {**LAYERS, **CAUSAL, "n_frequency": 16}),
    "OFT": ("OFTConfig", {**LAYERS, **CAUSAL, "oft_block_size": 4, "module_dropout": 0.2}),
    "BOFT": ("BOFTConfig", {**LAYERS, **CAUSAL, "boft_block_size": 4, "boft_dropout": 0.2}),
    "HRA": ("HRAConfig", {**LAYERS, **CAUSAL, "r": 2}),
    "MiSS": ("MissConfig", {**LAYERS, **CAUSAL, "r": 2}),
    "SHiRA": ("ShiraConfig", {**LAYERS, **CAUSAL, "r": 2}),
    "C3A": ("C3AConfig", {**LAYERS, **CAUSAL, "block_size": 4}),
    "RoAd": ("RoadConfig", {**LAYERS, **CAUSAL, "group_size": 4}),
    "DeLoRA": ("DeloraConfig", {**LAYERS, **CAUSAL, "r": 2}),
    "WaveFT": ("WaveFTConfig", {**LAYERS, **CAUSAL, "n_frequency": 16}),
    "GraLoRA": ("GraloraConfig", {**LAYERS, **CAUSAL, "r": 4, "gralora_k": 2}),
    "HiRA": ("HiraConfig", {**LAYERS, **CAUSAL, "r": 2, "hira_dropout": 0.1}),
    "Lily": ("LilyConfig", {**LAYERS, **CAUSAL, "r": 2, "stride_A": 1, "num_B": 2}),
    "OSF, gradients projected": ("OSFConfig", {**LAYERS, **CAUSAL, "effective_rank": 4}),
    "PEANuT": ("PeanutConfig", {**LAYERS, **CAUSAL, "r": 2}),
    "PSOFT": ("PsoftConfig", {**LAYERS, **CAUSAL, "r": 2, "psoft_dropout": 0.1}),
    "PVeRA, random weights": ("PveraConfig", {"target_modules": ["q_proj"], **CAUSAL, "r": 4}),
    "PVeRA, a generator of its own": (
        "PveraConfig",
        {"target_modules": ["q_proj"], **CAUSAL, "r": 4, "generator_seed": 7, "sample_at_inference": True},
    ),
    "BEFT": ("BeftConfig", {**LAYERS, **CAUSAL}),
    "GLoRA": ("GloraConfig", {**LAYERS, **CAUSAL, "r": 2}),
    "TinyLoRA": ("TinyLoraConfig", {**LAYERS, **CAUSAL, "r": 2, "u": 4}),
    "Uni-LoRA": ("UniLoraConfig", {**LAYERS, **CAUSAL, "r": 2, "theta_d_length": 16}),
    "AdaMSS, subspaces chosen on the way": (
        "AdamssConfig",
        {
            **LAYERS,
            **CAUSAL,
            "r": 4,
            "num_subspaces": 2,
            "use_asa": True,
            "asa_target_subspaces": 2,
            "init_warmup": 0,
            "final_warmup": 3,
            "mask_interval": 1,
        },
    ),
    "LN tuning": ("LNTuningConfig", {**CAUSAL, "target_modules": ["input_layernorm", "norm"]}),
    "trainable tokens": ("TrainableTokensConfig", {**CAUSAL, "token_indices": [4, 5, 6]}),
    "prompt tuning": ("PromptTuningConfig", VIRTUAL),
    "prefix tuning": ("PrefixTuningConfig", VIRTUAL),
    "prefix tuning, projected": (
        "PrefixTuningConfig",
        {**VIRTUAL, "prefix_projection": True, "encoder_hidden_size": 8},
    ),
    "p-tuning, MLP": ("PromptEncoderConfig", {**VIRTUAL, "encoder_hidden_size": 8, "encoder_dropout": 0.1}),
    "p-tuning, LSTM": (
        "PromptEncoderConfig",
        {**VIRTUAL, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8, "encoder_num_layers": 2},
    ),
    "adaption prompt": ("AdaptionPromptConfig", {**CAUSAL, "adapter_len": 3, "adapter_layers": 2}),
}
QUICK = {"LoRA", "LoRA, modules to save", "DoRA", "AdaLoRA", "LoHa", "OFT", "prefix tuning", "p-tuning, MLP"}


class Allocates(TrainerCallback):
    """AdaLoRA's choice of ranks, which reads the gradients that the optimizer stepped along."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step + 1)


def causal_builder(wrap, tmp_path, architecture="Llama", callbacks=(), **overrides):
    row = ZOO[architecture]

    def build(cls, **sam):
        model = row.build()
        return cls(
            model=wrap(model),
            args=kit.arguments(tmp_path, **overrides),
            train_dataset=row.data(),
            eval_dataset=row.data()[:4],
            data_collator=row.collate,
            compute_metrics=kit.checksums,
            callbacks=[callback() for callback in callbacks],
            **sam,
        )

    return build


@pytest.mark.parametrize(
    ("kind", "micro_batches"),
    [
        pytest.param(kind, count, marks=[] if kind in QUICK and count == 1 else pytest.mark.slow)
        for kind in ADAPTERS
        for count in (1, 2)
    ],
)
def test_an_adapter(kind, micro_batches, tmp_path):
    name, options = ADAPTERS[kind]

    def wrap(model):
        return peft.get_peft_model(model, getattr(peft, name)(**options))

    build = causal_builder(
        wrap,
        tmp_path,
        architecture="Mixtral, router's loss" if "experts" in kind else "Llama",
        callbacks=[Allocates] if kind.startswith("Ada") else [],
        gradient_accumulation_steps=micro_batches,
    )
    kit.assert_same_as_stock(build)


def only(*patterns):
    """Freeze every parameter whose name has none of `patterns` in it."""

    def wrap(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(pattern in name for pattern in patterns))
        return model

    return wrap


@pytest.mark.parametrize(
    ("architecture", "patterns"),
    [
        ("GPT-2", ["bias"]),
        pytest.param("GPT-2", ["ln_"], marks=pytest.mark.slow),
        pytest.param("Llama", ["embed_tokens"], marks=pytest.mark.slow),
        pytest.param("Bloom", ["h.1.", "ln_f"], marks=pytest.mark.slow),
    ],
    ids=["biases", "norms", "embeddings", "last layer"],
)
def test_a_part_of_the_model(architecture, patterns, tmp_path):
    kit.assert_same_as_stock(causal_builder(only(*patterns), tmp_path, architecture))


def test_an_adapter_that_a_callback_switches(tmp_path):
    """Two adapters; from the second step on the other one trains."""

    class Switches(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.set_adapter("second")

    def wrap(model):
        options = peft.LoraConfig(**{**LORA, "init_lora_weights": False})
        model = peft.get_peft_model(model, options)
        model.add_adapter("second", options)
        for name, parameter in model.named_parameters():
            if "lora" in name:  # the optimizer has to know both
                parameter.requires_grad_(True)
        return model

    kit.assert_same_as_stock(causal_builder(wrap, tmp_path, callbacks=[Switches]))


# By architecture: the layers that get an adapter, and what trains beside them.
ELSEWHERE = {
    "ViT": {"target_modules": "all-linear", "modules_to_save": ["classifier"]},
    "ResNet, BatchNorm": {"target_modules": ["convolution"], "modules_to_save": ["classifier"]},
    "MobileNetV2, BatchNorm": {"target_modules": ["classifier"], "modules_to_save": ["normalization"]},
    "SegFormer": {"target_modules": "all-linear", "modules_to_save": ["decode_head"]},
    "wav2vec 2.0 conformer, BatchNorm": {"target_modules": ["linear_q", "linear_v"]},
    "Whisper": {"target_modules": ["q_proj", "v_proj"]},
    "T5, generating": {"target_modules": ["q", "v"]},
    "BART, layers left out": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
    "Mamba": {"target_modules": ["in_proj", "x_proj"]},
    "Mixtral, router's loss": {"target_modules": ["q_proj", "v_proj"]},
    "Llama, frequencies that follow the length": {"target_modules": ["q_proj"]},
    "CLIP, contrastive": {"target_modules": ["q_proj", "v_proj"]},
    "Time series transformer": {"target_modules": ["q_proj", "v_proj"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ELSEWHERE))
def test_an_adapter_in_another_architecture(name, tmp_path):
    row = ZOO[name]

    def build(cls, **sam):
        options = peft.LoraConfig(r=2, lora_dropout=0.1, init_lora_weights=False, **ELSEWHERE[name])
        settings = {"label_names": ["labels"], **row.arguments, "gradient_accumulation_steps": 2}
        return cls(
            model=peft.get_peft_model(row.build(), options),
            args=kit.arguments(tmp_path, kit.arguments_of(row.stock), **settings),
            train_dataset=row.data(),
            eval_dataset=row.data()[:4],
            data_collator=row.collate,
            compute_metrics=kit.checksums if row.checks_predictions else None,
            **sam,
        )

    kit.assert_same_as_stock(build, row.stock)
