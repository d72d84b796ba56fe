"""What becomes of each key of ``config.json`` and ``generation_config.json``.

The tables hold every key of transformers' ``Ministral3Config``, of its rope parameters and of its
``GenerationConfig``, and those that the Nemotron-Labs-Diffusion classes add. A test compares them
with the installed version, so a key that transformers gains has to be decided here.
"""

from __future__ import annotations

from trimode.formats.json_fields import KeyTable, neutral, only, understood

_DEFAULT = "it says how transformers reports results, which changes none of them"
_TRAINING = "it acts on the loss alone"
_SAMPLING = (
    "a sampling default of transformers' generate(), which this family does not use: its own "
    "functions are greedy unless the caller asks, and so is trimode"
)
_LENGTH = "a default length; every call of trimode gives its own"
_BEAMS = "it acts on beam search alone, and num_beams has to be 1"
_ASSISTED = "it steers assisted generation, which does not change what is generated"
_LOGITS = "trimode has no such step between the logits and the next token"

GENERATION_KEYS: KeyTable = {
    **understood("read as the end tokens, before config.json's", "eos_token_id"),
    **neutral("config.json's is used", "bos_token_id"),
    **neutral("trimode has no padded batches", "pad_token_id"),
    **neutral(_SAMPLING, "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h"),
    **neutral(_SAMPLING, "typical_p", "epsilon_cutoff", "eta_cutoff"),
    **neutral(_LENGTH, "max_length", "max_new_tokens"),
    **only("a least length is given with each call", min_length=0, min_new_tokens=0),
    **only("trimode has no limit of time", max_time=()),
    **only("stop strings are given with each call", stop_strings=([],)),
    **only("trimode has no beam search", num_beams=1, num_beam_groups=1, diversity_penalty=0),
    **only("trimode has no beam search", constraints=([],), force_words_ids=([],)),
    **neutral(_BEAMS, "early_stopping", "length_penalty", "low_memory"),
    **only("ask for more texts in the call", num_return_sequences=1),
    **only(_LOGITS, repetition_penalty=1, encoder_repetition_penalty=1, no_repeat_ngram_size=0),
    **only(_LOGITS, encoder_no_repeat_ngram_size=0, bad_words_ids=([],), sequence_bias=({}, [])),
    **only(_LOGITS, suppress_tokens=([],), begin_suppress_tokens=([],), guidance_scale=1),
    **only(_LOGITS, exponential_decay_length_penalty=(), watermarking_config=()),
    **only(_LOGITS, forced_bos_token_id=(), forced_eos_token_id=()),
    **only(_LOGITS, penalty_alpha=0, dola_layers=()),
    **neutral("logits here are finite", "remove_invalid_values"),
    **neutral("softmax of logits and of their logarithms is one", "renormalize_logits"),
    **only("trimode takes the prompt's tokens as they are", token_healing=False),
    **only("this family has no layers for multi-token prediction", use_mtp=False),
    **neutral("the cache is part of the graphs", "use_cache", "max_cache_len"),
    **only(
        "a quantized cache changes results",
        cache_implementation=("dynamic", "static", "offloaded", "offloaded_static", "paged"),
    ),
    **only("a quantized cache changes results", cache_config=({},)),
    **neutral(_DEFAULT, "output_attentions", "output_hidden_states", "output_scores"),
    **neutral(_DEFAULT, "output_logits", "return_dict_in_generate"),
    **neutral("it acts on encoder-decoder models alone", "decoder_start_token_id"),
    **neutral(_ASSISTED, "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
    **neutral(_ASSISTED, "assistant_confidence_threshold", "prompt_lookup_num_tokens"),
    **neutral(_ASSISTED, "max_matching_ngram_size", "assistant_early_exit", "speculation_type"),
    **neutral(_ASSISTED, "assistant_lookbehind", "target_lookbehind"),
    **only("an ensemble with an assistant changes results", assistant_ensemble_weight=0),
    **neutral("it says how transformers runs", "compile_config", "disable_compile"),
    **neutral("it says how transformers runs", "continuous_batching_config", "prefill_chunk_size"),
    **neutral("bookkeeping", "transformers_version", "_from_model_config", "_commit_hash"),
}

CONFIG_KEYS: KeyTable = {
    # transformers 4 wrote generation defaults here; what refuses them there refuses them here.
    **GENERATION_KEYS,
    **understood("decides the graphs' shapes", "vocab_size", "hidden_size", "intermediate_size"),
    **understood("decides the graphs' shapes", "num_hidden_layers", "num_attention_heads"),
    **understood("decides the graphs' shapes", "num_key_value_heads", "head_dim", "block_size"),
    **understood("a constant of the graphs", "rms_norm_eps"),
    **understood("the longest text", "max_position_embeddings"),
    **understood("decides the position tables", "rope_parameters", "rope_scaling", "rope_theta"),
    **understood("decides the position tables", "original_max_position_embeddings"),
    **understood("decides the position tables", "partial_rotary_factor"),
    **understood("special tokens", "mask_token_id", "bos_token_id", "eos_token_id"),
    **understood("which model this is", "architectures", "model_type"),
    **understood("which attention each layer has", "layer_types"),
    **only("the graphs have SwiGLU layers", hidden_act="silu"),
    **only("the graphs have no biases", attention_bias=False, mlp_bias=False),
    **only("the head has weights of its own", tie_word_embeddings=False),
    **only("the graphs attend to the whole text", sliding_window=(), use_sliding_window=False),
    **only("all layers are alike in the graphs", per_layer_config=({},), mlp_layer_types=()),
    **only("16-bit weights are compiled, see `trimode build --precision`", quantization_config=()),
    **only("its attention is bidirectional when drafting", dlm_paradigm="bidirectional"),
    **only("a masked slot predicts itself", dlm_type="llada", shift_logits=False),
    **only("the trunk is one", dlm_arch="encoder", num_ar_layers=0, num_diffusion_layers=0),
    **only("a decoder is compiled", is_encoder_decoder=False, add_cross_attention=False),
    **only("all heads are compiled", pruned_heads=({},)),
    **neutral("a dropout is off when a model answers", "attention_dropout"),
    **neutral("it acts on new weights alone", "initializer_range"),
    **neutral("it says how transformers runs", "attn_implementation", "_attn_implementation"),
    **neutral("it says how transformers runs", "_attn_implementation_autoset", "torchscript"),
    **neutral("it says how transformers runs", "chunk_size_feed_forward", "pretraining_tp"),
    **neutral("it says how transformers runs", "experts_implementation", "is_decoder"),
    **neutral("each tensor says its own type", "dtype", "torch_dtype", "use_bfloat16"),
    **neutral(_DEFAULT, "return_dict", "tie_last_hidden_states"),
    **neutral(_TRAINING, "dlm_loss_weight", "ar_loss_weight", "diff_loss_weight"),
    **neutral(_TRAINING, "dp_varying_mask_ratio", "complementary_mask", "global_loss_avg"),
    **neutral(_TRAINING, "prefix_ratio", "random_length_prob", "num_skip_loss_tokens"),
    **neutral(_TRAINING, "adaptive_mask_rate", "multi_sampling", "tok_mask_half_life_ratio"),
    **neutral("it acts on classifiers alone", "id2label", "label2id", "num_labels"),
    **neutral("it acts on classifiers alone", "problem_type", "finetuning_task"),
    **neutral("bookkeeping", "_name_or_path", "name_or_path", "transformers_version", "auto_map"),
    **neutral("bookkeeping", "_commit_hash", "tokenizer_class", "task_specific_params"),
    **neutral("bookkeeping of training tools", "unsloth_version", "unsloth_fixed"),
    **neutral("the tokenizer's files say it", "sep_token_id", "prefix"),
}

ROPE_KEYS: KeyTable = {
    **understood("decides the position tables", "rope_type", "type", "rope_theta", "factor"),
    **understood("decides the position tables", "original_max_position_embeddings"),
    **understood("decides the position tables", "beta_fast", "beta_slow", "truncate"),
    **understood("decides the position tables", "attention_factor", "mscale", "mscale_all_dim"),
    **understood("decides the position tables", "llama_4_scaling_beta"),
    **only("the graphs rotate the whole head", partial_rotary_factor=1),
    **neutral("the model's own length is config.json's", "max_position_embeddings"),
    **only("a part of longrope alone", short_factor=(), long_factor=()),
    **only("a part of llama3's rope alone", low_freq_factor=(), high_freq_factor=()),
    **only("texts have one axis", mrope_section=()),
}
