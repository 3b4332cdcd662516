"""Language models of transformers from small configurations, random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.registry import Built, case, keywords

VOCABULARY = 60
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHORT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def ids(length: int = 8) -> Tensor:
    """Two rows of tokens without special ones."""
    return torch.randint(3, VOCABULARY, (2, length))


def text(
    name: str,
    model: str,
    options: dict[str, Any],
    *,
    mask: bool = False,
    core: bool = False,
    notes: str = "",
    extra: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    length: int = 8,
    refused: str = "",
    imports: tuple[str, ...] = (),
) -> None:
    """Enter ``transformers.<family><head>`` (``family:head``) called with tokens and perhaps a padding mask."""

    @case(name, core=core, notes=notes, refused=refused, imports=imports)
    def build() -> Built:
        import transformers

        family, _, head = model.partition(":")
        kept = {key: value for key, value in options.items() if key not in drop}
        made = getattr(transformers, f"{family}{head or 'Model'}")(getattr(transformers, f"{family}Config")(**kept))

        def call() -> dict[str, Any]:
            made = {"input_ids": ids(length), **(extra or {})}
            if mask:
                made["attention_mask"] = torch.ones(2, length, dtype=torch.int64)
                made["attention_mask"][1, length - 3 :] = 0
            return made

        return made, keywords(call)


NO_CACHE = {"use_cache": False}
LLAMA = {**TINY, "num_key_value_heads": 1, "use_cache": False}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

text("hf_bert", "Bert", TINY, mask=True, core=True)
text("hf_distilbert", "DistilBert:ForSequenceClassification", {
    "vocab_size": VOCABULARY, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64,
}, mask=True, core=True)  # fmt: skip
text("hf_gpt2", "GPT2:LMHeadModel", {**GPT2, "use_cache": False}, core=True, notes="head tied to the embedding")
text("hf_gpt2_cache", "GPT2:LMHeadModel", GPT2, core=True, notes="the result holds a DynamicCache, a plain object")
text("hf_llama", "Llama:ForCausalLM", LLAMA, core=True)
text("hf_llama_cache_mask", "Llama:ForCausalLM", {**LLAMA, "use_cache": True}, mask=True)
text("hf_roberta", "Roberta", {**TINY, "pad_token_id": 1, "bos_token_id": 0}, mask=True)
text("hf_xlm_roberta_lm", "XLMRoberta:ForMaskedLM", {**TINY, "pad_token_id": 1, "bos_token_id": 0})
text("hf_camembert", "Camembert:ForTokenClassification", {**TINY, "pad_token_id": 1, "bos_token_id": 0})
text("hf_albert", "Albert", {**TINY, "embedding_size": 8}, mask=True, notes="one layer's weights used three times")
text("hf_electra", "Electra:ForPreTraining", {**TINY, "embedding_size": 8}, mask=True)
text("hf_deberta_v2", "DebertaV2", {
    **TINY, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "conv_kernel_size": 3,
}, mask=True)  # fmt: skip
text("hf_deberta", "Deberta", {**TINY, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, mask=True)
text("hf_bert_hidden_states", "Bert", {**TINY, "output_hidden_states": True}, notes="every layer's value returned")
text("hf_bert_attentions", "Bert", {**TINY, "output_attentions": True, "attn_implementation": "eager"})
text("hf_bert_tuple", "Bert", {**TINY, "return_dict": False})
text("hf_mobilebert", "MobileBert", {**TINY, "embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8})
text("hf_mpnet", "MPNet", {**TINY, "pad_token_id": 1, "bos_token_id": 0})
text("hf_squeezebert", "SqueezeBert", {**TINY, "embedding_size": 16})
text("hf_convbert", "ConvBert", {**TINY, "embedding_size": 16, "head_ratio": 1, "conv_kernel_size": 3})
text("hf_fnet", "FNet", TINY, notes="Fourier transforms")
text("hf_funnel", "Funnel", {
    "vocab_size": VOCABULARY, "block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32,
    "num_decoder_layers": 1,
}, length=16)  # fmt: skip
text("hf_xlnet", "XLNet", {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32})
text("hf_xlm", "XLM", {"vocab_size": VOCABULARY, "emb_dim": 16, "n_layers": 2, "n_heads": 2})
text("hf_rembert", "RemBert", {**TINY, "input_embedding_size": 8, "output_embedding_size": 8})
text("hf_roformer", "RoFormer", {**TINY, "embedding_size": 16}, mask=True)
text("hf_ernie", "Ernie", TINY, mask=True)
text("hf_splinter", "Splinter", TINY)
text("hf_ibert", "IBert", {**TINY, "pad_token_id": 1, "bos_token_id": 0})
text("hf_megatron_bert", "MegatronBert", TINY)
text("hf_modernbert", "ModernBert", {**TINY, "global_attn_every_n_layers": 2, "local_attention": 4, "cls_token_id": 1,
                                     "sep_token_id": 2}, mask=True)  # fmt: skip
text("hf_nystromformer", "Nystromformer", {**TINY, "num_landmarks": 4, "segment_means_seq_len": 16}, length=16,
     refused="a shape its fake tensors reject")  # fmt: skip
text("hf_bigbird_full", "BigBird", {**TINY, "attention_type": "original_full"})
text("hf_longformer", "Longformer", {**TINY, "attention_window": 4, "pad_token_id": 1, "bos_token_id": 0},
     refused="branches on whether any token has global attention")  # fmt: skip
text("hf_canine", "Canine", {**TINY, "local_transformer_stride": 16, "downsampling_rate": 2, "num_hash_buckets": 64},
     length=32)  # fmt: skip
text("hf_opt", "OPT:ForCausalLM", {**TINY, "ffn_dim": 32, "word_embed_proj_dim": 16, "use_cache": False}, mask=True)
text("hf_bloom", "Bloom:ForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 3, "n_head": 2,
                                       "use_cache": False}, mask=True)  # fmt: skip
text("hf_mistral", "Mistral:ForCausalLM", {**LLAMA, "sliding_window": 4})
text("hf_mixtral", "Mixtral:ForCausalLM", {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2},
     imports=("transformers.integrations.moe",), notes="a custom operator of transformers")  # fmt: skip
text("hf_qwen2", "Qwen2:ForCausalLM", LLAMA, mask=True)
text("hf_qwen3", "Qwen3:ForCausalLM", {**LLAMA, "head_dim": 8})
text("hf_gemma", "Gemma:ForCausalLM", {**LLAMA, "head_dim": 8})
text("hf_gemma2", "Gemma2:ForCausalLM", {**LLAMA, "head_dim": 8, "sliding_window": 4})
text("hf_phi", "Phi:ForCausalLM", {**LLAMA, "num_key_value_heads": 2})
text("hf_phi3", "Phi3:ForCausalLM", {**LLAMA, "num_key_value_heads": 2})
text("hf_gpt_neox", "GPTNeoX:ForCausalLM", {**TINY, "use_cache": False})
text("hf_gpt_neo", "GPTNeo:ForCausalLM", {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types":
    [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": 64, "use_cache": False,
})  # fmt: skip
text("hf_gptj", "GPTJ:ForCausalLM", {**GPT2, "rotary_dim": 4, "use_cache": False})
text("hf_codegen", "CodeGen:ForCausalLM", {**GPT2, "n_head": 4, "rotary_dim": 4, "use_cache": False})
text("hf_gpt_bigcode", "GPTBigCode:ForCausalLM", {**GPT2, "use_cache": False})
text("hf_falcon", "Falcon:ForCausalLM", {**TINY, "use_cache": False, "alibi": True})
text("hf_mpt", "Mpt:ForCausalLM", {"vocab_size": VOCABULARY, "d_model": 16, "n_heads": 2, "n_layers": 2,
                                   "expansion_ratio": 2, "max_seq_len": 64, "use_cache": False})  # fmt: skip
text("hf_stablelm", "StableLm:ForCausalLM", {**LLAMA, "num_key_value_heads": 2})
text("hf_olmo", "Olmo:ForCausalLM", LLAMA)
text("hf_cohere", "Cohere:ForCausalLM", LLAMA)
text("hf_granite", "Granite:ForCausalLM", LLAMA)
text("hf_starcoder2", "Starcoder2:ForCausalLM", LLAMA)
text("hf_ctrl", "CTRL", {"vocab_size": VOCABULARY, "n_embd": 16, "dff": 32, "n_layer": 2, "n_head": 2,
                         "n_positions": 64, "use_cache": False})  # fmt: skip
text("hf_openai_gpt", "OpenAIGPT", GPT2)
text("hf_biogpt", "BioGpt:ForCausalLM", {**TINY, "use_cache": False})
text("hf_xglm", "XGLM:ForCausalLM", {"vocab_size": VOCABULARY, "d_model": 16, "num_layers": 2, "attention_heads": 2,
                                     "ffn_dim": 32, "max_position_embeddings": 64, "use_cache": False})  # fmt: skip
text("hf_mamba", "Mamba:ForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4,
                                       "num_hidden_layers": 2, "use_cache": False}, notes="scan unrolled")  # fmt: skip
text("hf_rwkv", "Rwkv", {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "use_cache": False})

T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
      "decoder_start_token_id": 0, "pad_token_id": 0}  # fmt: skip


def seq2seq(
    name: str, model: str, options: dict[str, Any], *, core: bool = False, notes: str = "", refused: str = ""
) -> None:
    """Enter an encoder-decoder called with tokens for both sides."""

    @case(name, core=core, notes=notes, refused=refused)
    def build() -> Built:
        import transformers

        family, _, head = model.partition(":")
        made = getattr(transformers, f"{family}{head or 'Model'}")(getattr(transformers, f"{family}Config")(**options))
        return made, keywords(lambda: {"input_ids": ids(8), "decoder_input_ids": ids(5)})


seq2seq("hf_t5", "T5:ForConditionalGeneration", {**T5, "use_cache": False}, core=True, notes="encoder read by all")
seq2seq("hf_t5_cache", "T5:ForConditionalGeneration", T5, notes="the result holds an EncoderDecoderCache")
seq2seq("hf_t5_gated", "T5", {**T5, "feed_forward_proj": "gated-gelu", "use_cache": False})
seq2seq("hf_bart", "Bart", {**SHORT, "use_cache": False})
seq2seq("hf_mbart", "MBart:ForConditionalGeneration", {**SHORT, "use_cache": False})
seq2seq("hf_pegasus", "Pegasus", {**SHORT, "use_cache": False})
seq2seq("hf_marian", "Marian", {**SHORT, "use_cache": False})
seq2seq("hf_m2m100", "M2M100", {**SHORT, "use_cache": False})
seq2seq("hf_blenderbot", "Blenderbot", {**SHORT, "use_cache": False})
seq2seq("hf_led", "LED", {**SHORT, "attention_window": 4, "max_encoder_position_embeddings": 64,
                          "max_decoder_position_embeddings": 64, "use_cache": False},
        refused="branches on whether any token has global attention")  # fmt: skip
seq2seq("hf_prophetnet", "ProphetNet", {
    "vocab_size": VOCABULARY, "hidden_size": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_encoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2,
    "max_position_embeddings": 64, "use_cache": False,
})  # fmt: skip
