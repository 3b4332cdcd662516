"""Sound, several modalities and time series: models of transformers, random weights."""

from __future__ import annotations

from typing import Any

import torch

from models.registry import Built, case, keywords

TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TEXT: dict[str, Any] = {
    **TINY, "vocab_size": 60, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
PATCH: dict[str, Any] = {**TINY, "image_size": 32, "patch_size": 8}
WAVE: dict[str, Any] = {
    **TINY, "conv_dim": [8, 8, 8], "conv_kernel": [10, 3, 3], "conv_stride": [5, 2, 2], "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": 20, "mask_time_prob": 0.0,
}  # fmt: skip


@case("hf_whisper_encoder", core=True)
def whisper_encoder() -> Built:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=16,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=20,
    )
    return WhisperEncoder(config), keywords(lambda: {"input_features": torch.randn(1, 8, 40)})


@case("hf_whisper", notes="encoder and decoder")
def whisper() -> Built:
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(
        vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, use_cache=False,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=20,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperModel(config), keywords(
        lambda: {"input_features": torch.randn(1, 8, 40), "decoder_input_ids": torch.randint(3, 60, (1, 5))}
    )


def sound(name: str, model: str, **options: Any) -> None:
    """Enter a model that reads raw samples."""

    @case(name)
    def build() -> Built:
        import transformers

        family, _, head = model.partition(":")
        config = getattr(transformers, f"{family}Config")(**{**WAVE, **options})
        made = getattr(transformers, f"{family}{head or 'Model'}")(config)
        return made, keywords(lambda: {"input_values": torch.randn(1, 400)})


sound("hf_wav2vec2", "Wav2Vec2:ForCTC", ctc_zero_infinity=True)
sound("hf_hubert", "Hubert")
sound("hf_wavlm", "WavLM")
sound("hf_sew", "SEW", squeeze_factor=2)
sound("hf_unispeech", "UniSpeech")
sound("hf_data2vec_audio", "Data2VecAudio", conv_pos_kernel_size=5, num_conv_pos_embeddings=2)


@case("hf_audio_spectrogram")
def spectrogram() -> Built:
    from transformers import ASTConfig, ASTModel

    config = ASTConfig(**TINY, patch_size=4, max_length=24, num_mel_bins=16, frequency_stride=4, time_stride=4)
    return ASTModel(config), keywords(lambda: {"input_values": torch.randn(1, 24, 16)})


@case("hf_encodec_encoder", refused="computes its padding from integer buffers")
def encodec() -> Built:
    from transformers import EncodecConfig
    from transformers.models.encodec.modeling_encodec import EncodecEncoder

    config = EncodecConfig(hidden_size=16, num_filters=4, upsampling_ratios=[2, 2], num_lstm_layers=1)
    return EncodecEncoder(config), keywords(lambda: {"hidden_states": torch.randn(1, 1, 64)})


def pair(name: str, family: str, vision: dict[str, Any], text: dict[str, Any], **options: Any) -> None:
    """Enter a two-tower model over an image and tokens."""

    @case(name, notes="two inputs, nested result objects")
    def build() -> Built:
        import transformers

        config = getattr(transformers, f"{family}Config")(vision_config=vision, text_config=text, **options)
        made = getattr(transformers, f"{family}Model")(config)
        return made, keywords(
            lambda: {"input_ids": torch.randint(3, 59, (2, 7)), "pixel_values": torch.randn(2, 3, 32, 32)}
        )


pair("hf_clip", "CLIP", PATCH, TEXT, projection_dim=12)
pair("hf_siglip", "Siglip", PATCH, {**TEXT, "max_position_embeddings": 7, "projection_size": 16})
pair("hf_chinese_clip", "ChineseCLIP", PATCH, TEXT, projection_dim=12)
pair("hf_groupvit", "GroupViT", {
    **PATCH, "depths": [1, 1, 0], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0],
}, TEXT, projection_dim=12, projection_intermediate_dim=16)  # fmt: skip


@case("hf_layoutlm", notes="tokens and boxes")
def layoutlm() -> Built:
    from transformers import LayoutLMConfig, LayoutLMModel

    model = LayoutLMModel(LayoutLMConfig(**TEXT, max_2d_position_embeddings=64))
    return model, keywords(
        lambda: {"input_ids": torch.randint(3, 60, (1, 7)), "bbox": torch.randint(0, 30, (1, 7, 4)).sort(-1).values}
    )


@case("hf_visual_bert")
def visual_bert() -> Built:
    from transformers import VisualBertConfig, VisualBertModel

    model = VisualBertModel(VisualBertConfig(**TEXT, visual_embedding_dim=12))
    return model, keywords(lambda: {"input_ids": torch.randint(3, 60, (1, 7)), "visual_embeds": torch.randn(1, 4, 12)})


@case("hf_perceiver")
def perceiver() -> Built:
    from transformers import PerceiverConfig, PerceiverModel

    config = PerceiverConfig(
        num_latents=6, d_latents=16, d_model=12, num_blocks=1, num_self_attends_per_block=2,
        num_self_attention_heads=2, num_cross_attention_heads=2,
    )  # fmt: skip
    return PerceiverModel(config), keywords(lambda: {"inputs": torch.randn(1, 9, 12)})


@case("hf_patchtst", notes="time series")
def patchtst() -> Built:
    from transformers import PatchTSTConfig, PatchTSTModel

    config = PatchTSTConfig(
        num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, d_model=16, num_attention_heads=2,
        num_hidden_layers=2, ffn_dim=32,
    )  # fmt: skip
    return PatchTSTModel(config), keywords(lambda: {"past_values": torch.randn(2, 16, 2)})


@case("hf_patchtsmixer", notes="time series")
def patchtsmixer() -> Built:
    from transformers import PatchTSMixerConfig, PatchTSMixerModel

    config = PatchTSMixerConfig(
        num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, d_model=8, num_layers=2
    )
    return PatchTSMixerModel(config), keywords(lambda: {"past_values": torch.randn(2, 16, 2)})


@case("hf_decision_transformer")
def decision() -> Built:
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    model = DecisionTransformerModel(
        DecisionTransformerConfig(state_dim=5, act_dim=3, hidden_size=16, n_layer=2, n_head=2, max_ep_len=32)
    )
    return model, keywords(
        lambda: {
            "states": torch.randn(1, 4, 5),
            "actions": torch.randn(1, 4, 3),
            "rewards": torch.randn(1, 4, 1),
            "returns_to_go": torch.randn(1, 4, 1),
            "timesteps": torch.arange(4)[None],
            "attention_mask": torch.ones(1, 4, dtype=torch.int64),
        }
    )


@case("hf_sam_vision", notes="windows, relative positions, a neck of convolutions")
def sam() -> Built:
    from transformers.models.sam.configuration_sam import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionModel

    config = SamVisionConfig(
        **TINY, output_channels=8, image_size=32, patch_size=4, window_size=3, global_attn_indexes=[1], mlp_dim=32
    )
    return SamVisionModel(config), keywords(lambda: {"pixel_values": torch.randn(1, 3, 32, 32)})
