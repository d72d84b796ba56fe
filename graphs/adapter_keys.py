"""What becomes of each key of a drafter's ``adapter_config.json``.

The table holds every field of PEFT's ``LoraConfig``; a test compares it with the installed version.
"""

from __future__ import annotations

from trimode.formats.json_fields import KeyTable, neutral, only, understood

_PLACES = "decides which projections have a branch"
_WEIGHTS = "the branch is x A' B' times a scale, and nothing else is trained"
_RUNS = "it says how PEFT trains or runs"

ADAPTER_KEYS: KeyTable = {
    **understood("decides the branch's rank and scale", "r", "rank_pattern", "use_rslora"),
    **understood("decides the branch's rank and scale", "lora_alpha", "alpha_pattern"),
    **understood(_PLACES, "target_modules", "exclude_modules"),
    **understood(_PLACES, "layers_to_transform", "layers_pattern"),
    **only("a LoRA adapter is compiled", peft_type="LORA"),
    **only(_WEIGHTS, bias="none", lora_bias=False, use_dora=False, modules_to_save=([],)),
    **only(_WEIGHTS, trainable_token_indices=([], {}), target_parameters=([],)),
    **only(_WEIGHTS, use_qalora=False, use_bdlora=(False,), arrow_config=(), kasa_config=()),
    **only(_WEIGHTS, monteclora_config=(), layer_replication=([],)),
    **only("weights lie as (out, in) in this family", fan_in_fan_out=False),
    **only("the drafter acts on every token of a draft", alora_invocation_tokens=([],)),
    **only(
        "other methods change the base weights; "
        "PEFT's path_initial_model_for_weight_conversion saves an adapter for unchanged ones",
        init_lora_weights=(True, False, "gaussian", "eva", "orthogonal", "mica"),
    ),
    **neutral("it acts on its own init_lora_weights alone", "loftq_config", "eva_config"),
    **neutral("it acts on its own init_lora_weights alone", "corda_config", "lora_ga_config"),
    **neutral("a dropout is off when a model answers", "lora_dropout"),
    **neutral(
        "only embeddings and heads can be tied, and they have no branch", "ensure_weight_tying"
    ),
    **neutral("it acts with use_qalora alone", "qalora_group_size"),
    **neutral(_RUNS, "inference_mode", "runtime_config", "megatron_config", "megatron_core"),
    **neutral("it changes the backward pass alone", "velora_config"),
    **neutral("bookkeeping", "task_type", "peft_version", "auto_mapping", "revision"),
    **neutral("bookkeeping", "base_model_name_or_path"),
}
