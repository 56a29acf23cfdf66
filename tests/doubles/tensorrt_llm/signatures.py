"""Signatures of TensorRT-LLM's two runners, recorded from its published source.

Names and defaults only; "*" begins the arguments that must be named. Each is that of the source
nearest to the release it stands for: the snapshots read are of 0.13-0.15, of 0.20-1.0 and of the
months before 1.2. Arguments come and go between releases: code that uses only what all have in
common runs on all of them.
"""

_CPP_FROM_DIR_0_13 = {
    "engine_dir": ...,
    "*": None,
    "lora_dir": None,
    "rank": 0,
    "max_batch_size": None,
    "max_input_len": None,
    "max_output_len": None,
    "max_beam_width": None,
    "max_attention_window_size": None,
    "sink_token_length": None,
    "kv_cache_free_gpu_memory_fraction": None,
    "medusa_choices": None,
    "lookahead_config": None,
    "debug_mode": False,
    "lora_ckpt_source": "hf",
    "gpu_weights_percent": 1,
    "max_tokens_in_paged_kv_cache": None,
    "kv_cache_enable_block_reuse": False,
    "enable_chunked_context": False,
    "is_enc_dec": False,
    "multi_block_mode": True,
    "enable_context_fmha_fp32_acc": None,
}
_CPP_FROM_DIR_1_0 = {
    **_CPP_FROM_DIR_0_13,
    "cross_kv_cache_fraction": None,
    "eagle_choices": None,
    "eagle_posterior_threshold": None,
    "eagle_use_dynamic_tree": False,
    "eagle_dynamic_tree_max_top_k": None,
    "use_gpu_direct_storage": False,
    "cuda_graph_mode": None,
    "logits_processor_map": None,
    "device_ids": None,
    "is_orchestrator_mode": False,
    "use_runtime_defaults": True,
    "gather_generation_logits": False,
    "use_variable_beam_width_search": False,
    "mm_embedding_offloading": False,
}
_CPP_GENERATE_0_13 = {
    "batch_input_ids": ...,
    "*": None,
    "position_ids": None,
    "encoder_input_ids": None,
    "encoder_input_features": None,
    "encoder_output_lengths": None,
    "sampling_config": None,
    "lora_uids": None,
    "lookahead_config": None,
    "streaming": False,
    "stopping_criteria": None,
    "logits_processor": None,
    "max_new_tokens": 1,
    "end_id": None,
    "pad_id": None,
    "bad_words_list": None,
    "stop_words_list": None,
    "return_dict": False,
    "output_sequence_lengths": False,
    "output_log_probs": False,
    "output_cum_log_probs": False,
    "prompt_table": None,
    "prompt_tasks": None,
    "input_token_extra_ids": None,
    "return_all_generated_tokens": False,
}
_CPP_GENERATE_1_0 = {
    **{name: value for name, value in _CPP_GENERATE_0_13.items() if name != "logits_processor"},
    "cross_attention_masks": None,
    "mrope_params": None,
    "logits_processor_names": None,
    "output_generation_logits": False,
    "language_adapter_uids": None,
    "mm_embedding_offloading": False,
}
_PYTHON_FROM_DIR = {
    "engine_dir": ...,
    "*": None,
    "max_output_len": None,
    "lora_dir": None,
    "rank": 0,
    "debug_mode": False,
    "lora_ckpt_source": "hf",
    "medusa_choices": None,
    "stream": None,
    "gpu_weights_percent": 1,
    "enable_context_fmha_fp32_acc": None,
    "multi_block_mode": None,
}
_PYTHON_GENERATE = {
    "batch_input_ids": ...,
    "position_ids": None,
    "sampling_config": None,
    "prompt_table": None,
    "prompt_tasks": None,
    "lora_uids": None,
    "streaming": False,
    "output_generation_logits": False,
    "stopping_criteria": None,
    "logits_processor": None,
    "medusa_choices": None,
    "encoder_max_input_length": None,
    "encoder_input_features": None,
    "encoder_output_lengths": None,
    "cross_attention_masks": None,
}
_ATTENTION_WINDOW = {"fail_fast_on_attention_window_too_large": False}

SIGNATURES = {
    "0.13.0": {
        "ModelRunnerCpp.from_dir": _CPP_FROM_DIR_0_13,
        "ModelRunnerCpp.generate": _CPP_GENERATE_0_13,
        "ModelRunner.from_dir": _PYTHON_FROM_DIR,
        "ModelRunner.generate": _PYTHON_GENERATE,
    },
    "1.0.0": {
        "ModelRunnerCpp.from_dir": _CPP_FROM_DIR_1_0,
        "ModelRunnerCpp.generate": _CPP_GENERATE_1_0,
        "ModelRunner.from_dir": _PYTHON_FROM_DIR,
        "ModelRunner.generate": _PYTHON_GENERATE,
    },
    "1.2.1": {
        "ModelRunnerCpp.from_dir": {**_CPP_FROM_DIR_1_0, **_ATTENTION_WINDOW},
        "ModelRunnerCpp.generate": _CPP_GENERATE_1_0,
        "ModelRunner.from_dir": {**_PYTHON_FROM_DIR, **_ATTENTION_WINDOW},
        "ModelRunner.generate": _PYTHON_GENERATE,
    },
}

# What `**kwargs` of generate may name. The real runners drop other names without a word.
_SAMPLING = {
    "num_beams": 1,
    "top_k": None,
    "top_p": None,
    "temperature": None,
    "repetition_penalty": None,
    "length_penalty": None,
    "early_stopping": None,
    "random_seed": None,
    "min_tokens": None,
    "beam_search_diversity_rate": None,
    "presence_penalty": None,
    "frequency_penalty": None,
    "no_repeat_ngram_size": None,
}
KEYWORDS = {
    "ModelRunnerCpp": _SAMPLING,
    # The fields of tensorrt_llm.runtime.SamplingConfig and their defaults.
    "ModelRunner": {
        **{name: value for name, value in _SAMPLING.items() if name != "min_tokens"},
        "end_id": None,
        "pad_id": None,
        "max_new_tokens": 20,
        "top_k": 1,
        "top_p": 0.0,
        "temperature": 1.0,
        "repetition_penalty": 1.0,
        "length_penalty": 1.0,
        "early_stopping": 1,
        "output_sequence_lengths": False,
        "return_dict": False,
        "output_cum_log_probs": False,
        "output_log_probs": False,
    },
}


def bind(version, method, positional, named):
    """The arguments that a call passes or leaves to their defaults; TypeError for any other."""
    signature = SIGNATURES[version][method]
    runner = method.partition(".")[0]
    extra = KEYWORDS[runner] if method.endswith(".generate") else {}
    names = list(signature)
    may_be_positional = names[: names.index("*")] if "*" in names else names
    if len(positional) > len(may_be_positional):
        raise TypeError(f"{method} takes {len(may_be_positional)} positional arguments")
    given = dict(zip(may_be_positional, positional, strict=False))
    unknown = set(named) - set(signature) - set(extra) | (set(named) & set(given))
    if unknown:
        raise TypeError(f"{method} of {version} does not know {sorted(unknown)}")
    bound = {**extra, **signature, **given, **named}
    bound.pop("*", None)
    missing = [name for name, value in bound.items() if value is ...]
    if missing:
        raise TypeError(f"{method} lacks {missing}")
    return bound
