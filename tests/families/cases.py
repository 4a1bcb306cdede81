"""The families under contract, as rows: a tiny config, and what the independent reference must know about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_BART = {
    "d_model": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}


@dataclass(frozen=True)
class Case:
    """``kind``: ``causal``, ``encoder`` or ``seq2seq``. ``alibi``: the function that builds the source's slopes.
    ``unused_rows``: rows at the head of a position table that no position uses. ``layers``: the config's layer counts.
    ``hybrid``: some layers of the source have no positions of their own."""

    family: str
    model: str
    settings: dict[str, Any]
    kind: str = "causal"
    layers: tuple[str, ...] = ("num_hidden_layers",)
    alibi: str = ""
    unused_rows: int = 0
    own: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    def __str__(self) -> str:
        return self.name or self.family


CASES = [
    Case("llama", "LlamaForCausalLM", _GROUPED),
    Case("llama", "LlamaForCausalLM", {**_GROUPED, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 16}, name="llama-dynamic"),
    Case("llama", "LlamaForCausalLM", {**_GROUPED, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}}, name="llama-yarn"),
    Case("llama", "LlamaForCausalLM", {**_GROUPED, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, name="llama-linear"),
    Case("llama", "LlamaForCausalLM", {**_GROUPED, "rope_parameters": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}}, name="llama-llama3"),
    Case("llama", "LlamaForCausalLM", {**_GROUPED, "rope_parameters": {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0, 1.0, 1.5, 2.0], "long_factor": [1.0, 2.0, 3.0, 4.0], "rope_theta": 1e4, "original_max_position_embeddings": 16}, "max_position_embeddings": 64}, name="llama-longrope"),
    Case("qwen2", "Qwen2ForCausalLM", _GROUPED),
    Case("qwen3", "Qwen3ForCausalLM", _GROUPED),
    Case("mistral", "MistralForCausalLM", {**_GROUPED, "sliding_window": 9}),
    Case("gemma2", "Gemma2ForCausalLM", {**_GROUPED, "sliding_window": 9, "query_pre_attn_scalar": 8}),
    Case("gemma3_text", "Gemma3ForCausalLM", {**_GROUPED, "sliding_window": 9, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    Case("phi", "PhiForCausalLM", _SIZES),
    Case("gpt_neox", "GPTNeoXForCausalLM", _SIZES),
    Case("olmo2", "Olmo2ForCausalLM", {**_SIZES, "num_key_value_heads": 2}),
    Case("mixtral", "MixtralForCausalLM", {**_GROUPED, **_MOE}),
    Case("deepseek_v3", "DeepseekV3ForCausalLM", {**_SIZES, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}),
    Case("llama4_text", "Llama4ForCausalLM", {**_GROUPED, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 9, "no_rope_layers": [1, 0]}),
    Case("gpt_oss", "GptOssForCausalLM", {**_GROUPED, **_MOE, "sliding_window": 9}),
    Case("gpt2", "GPT2LMHeadModel", {"n_embd": 32, "n_head": 4, "n_positions": 64}, layers=("n_layer",)),
    Case("opt", "OPTForCausalLM", {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, unused_rows=2),
    Case("bloom", "BloomForCausalLM", {"hidden_size": 32, "n_head": 4}, layers=("n_layer",), alibi="build_alibi_tensor"),
    Case("mpt", "MptForCausalLM", {"d_model": 32, "n_heads": 4, "max_seq_len": 64}, layers=("n_layers",), alibi="build_mpt_alibi_tensor"),
    Case("falcon", "FalconForCausalLM", {"hidden_size": 32, "num_attention_heads": 4, "alibi": True, "new_decoder_architecture": False}, alibi="build_alibi_tensor"),
    Case("falcon", "FalconForCausalLM", {"hidden_size": 32, "num_attention_heads": 4, "alibi": False}, name="falcon-rope"),
    Case("bert", "BertForMaskedLM", {**_SIZES, "max_position_embeddings": 64}, "encoder"),
    Case("bert", "BertLMHeadModel", {**_SIZES, "max_position_embeddings": 64, "is_decoder": True}, name="bert-decoder"),
    Case("roberta", "RobertaForMaskedLM", {**_SIZES, "max_position_embeddings": 64}, "encoder", unused_rows=1),
    Case("modernbert", "ModernBertForMaskedLM", {**_SIZES, "local_attention": 18, "layer_types": ["full_attention", "sliding_attention"]}, "encoder"),
    Case("distilbert", "DistilBertForMaskedLM", {"dim": 32, "hidden_dim": 48, "n_heads": 4, "max_position_embeddings": 64}, "encoder", ("n_layers",)),
    Case("bart", "BartForConditionalGeneration", _BART, "seq2seq", ("encoder_layers", "decoder_layers"), unused_rows=2),
    Case("bart", "BartForCausalLM", _BART, "causal", ("decoder_layers",), unused_rows=2, name="bart-decoder"),
    Case("pegasus", "PegasusForConditionalGeneration", _BART, "seq2seq", ("encoder_layers", "decoder_layers")),
    Case("t5", "T5ForConditionalGeneration", _T5, "seq2seq", ("num_layers", "num_decoder_layers")),
    Case("umt5", "UMT5ForConditionalGeneration", _T5, "seq2seq", ("num_layers", "num_decoder_layers")),
]  # fmt: skip

BY_NAME = {str(case): case for case in CASES}
