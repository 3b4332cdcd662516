"""Image models of transformers from small configurations, random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from models.convolution import randomised
from models.registry import Built, case, keywords


def vision(
    name: str, model: str, options: Callable[[], dict[str, Any]], size: int = 32, *, core: bool = False, notes: str = ""
) -> None:
    """Enter ``transformers.<model>Model`` or the full class name with its config built from ``options``."""

    @case(name, core=core, notes=notes)
    def build() -> Built:
        import transformers

        family, _, head = model.partition(":")
        config = getattr(transformers, f"{family}Config")(**options())
        made = getattr(transformers, f"{family}{head or 'Model'}")(config)
        return randomised(made), keywords(lambda: {"pixel_values": torch.randn(1, 3, size, size)})


TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
PATCH = {**TINY, "image_size": 32, "patch_size": 8}
CONV = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}

vision(
    "hf_resnet",
    "ResNet:ForImageClassification",
    lambda: {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [2, 2, 2, 2], "layer_type": "basic"},
    core=True,
)
vision(
    "hf_resnet_bottleneck",
    "ResNet",
    lambda: {"embedding_size": 8, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 2, 1, 1]},
)
vision("hf_vit", "ViT:ForImageClassification", lambda: PATCH, core=True)
vision("hf_convnext", "ConvNext:ForImageClassification", lambda: CONV, core=True)
vision(
    "hf_swin",
    "Swin:ForImageClassification",
    lambda: {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "window_size": 4,
    },
    core=True,
    notes="rolled windows",
)
vision(
    "hf_mobilenet_v2",
    "MobileNetV2:ForImageClassification",
    lambda: {"depth_multiplier": 0.25, "image_size": 32},
    core=True,
)
vision("hf_mobilenet_v1", "MobileNetV1", lambda: {"depth_multiplier": 0.25, "image_size": 32})
vision("hf_deit", "DeiT", lambda: PATCH)
vision("hf_dinov2", "Dinov2", lambda: PATCH)
vision("hf_beit", "Beit", lambda: {**PATCH, "use_relative_position_bias": True, "use_mean_pooling": True})
vision("hf_data2vec_vision", "Data2VecVision", lambda: {**PATCH, "use_shared_relative_position_bias": True})
vision("hf_regnet", "RegNet", lambda: {"embedding_size": 8, **CONV, "groups_width": 4})
vision("hf_convnextv2", "ConvNextV2", lambda: CONV)
vision(
    "hf_efficientnet",
    "EfficientNet",
    lambda: {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
)
vision(
    "hf_mobilevit",
    "MobileViT",
    lambda: {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "neck_hidden_sizes": [4, 8, 8, 12, 16, 20, 24],
        "num_attention_heads": 2,
    },
    size=64,
)
vision("hf_mobilevitv2", "MobileViTV2", lambda: {"image_size": 64, "width_multiplier": 0.25}, size=64)
vision(
    "hf_poolformer",
    "PoolFormer",
    lambda: {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
)
vision(
    "hf_segformer",
    "Segformer:ForSemanticSegmentation",
    lambda: {
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 16,
    },
    size=64,
)
vision("hf_ijepa", "IJepa", lambda: PATCH)
vision("hf_focalnet", "FocalNet", lambda: {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2]})
vision(
    "hf_levit",
    "Levit",
    lambda: {
        "image_size": 64,
        "hidden_sizes": [16, 24, 32],
        "num_attention_heads": [2, 2, 2],
        "depths": [1, 1, 1],
        "key_dim": [8, 8, 8],
        "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]],
    },
    size=64,
)
vision(
    "hf_cvt",
    "Cvt",
    lambda: {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
)
vision(
    "hf_pvt",
    "PvtV2",
    lambda: {
        "image_size": 64,
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
    },
    size=64,
)
vision(
    "hf_bit",
    "Bit",
    lambda: {"embedding_size": 8, "hidden_sizes": [32, 32, 64, 64], "num_groups": 4, "depths": [1, 1, 1, 1]},
)
vision(
    "hf_hiera",
    "Hiera",
    lambda: {
        "image_size": [32, 32],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "masked_unit_size": [4, 4],
        "query_stride": [2, 2],
        "num_query_pool": 1,
    },
)
vision(
    "hf_swin2sr",
    "Swin2SR:ForImageSuperResolution",
    lambda: {
        "image_size": 16,
        "embed_dim": 12,
        "depths": [2, 2],
        "num_heads": [2, 2],
        "window_size": 4,
        "upscale": 2,
    },
    size=16,
)
vision(
    "hf_dpt",
    "DPT:ForDepthEstimation",
    lambda: {
        **PATCH,
        "num_hidden_layers": 4,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 8, 8],
        "fusion_hidden_size": 8,
        "reassemble_factors": [4, 2, 1, 0.5],
    },
)
vision(
    "hf_glpn",
    "GLPN:ForDepthEstimation",
    lambda: {
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 16,
    },
    size=64,
)
vision("hf_vitdet", "VitDet", lambda: {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "pretrain_image_size": 32,
    "patch_size": 4, "window_size": 4, "window_block_indices": [0], "use_relative_position_embeddings": True,
})  # fmt: skip
vision("hf_yolos", "Yolos:ForObjectDetection", lambda: {**PATCH, "image_size": [32, 32], "num_detection_tokens": 4})
vision("hf_siglip_vision", "SiglipVision", lambda: PATCH)
vision("hf_vit_msn", "ViTMSN", lambda: PATCH)


@case("hf_detr")
def detr() -> Built:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    backbone.out_features = ["stage2"]
    config = DetrConfig(
        backbone_config=backbone,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        num_labels=4,
    )
    return randomised(DetrForObjectDetection(config)), keywords(lambda: {"pixel_values": torch.randn(1, 3, 64, 64)})


@case("hf_videomae", notes="five-dimensional input")
def videomae() -> Built:
    from transformers import VideoMAEConfig, VideoMAEModel

    model = VideoMAEModel(VideoMAEConfig(**{**PATCH, "num_frames": 4, "tubelet_size": 2}))
    return model, keywords(lambda: {"pixel_values": torch.randn(1, 4, 3, 32, 32)})


@case("hf_timesformer")
def timesformer() -> Built:
    from transformers import TimesformerConfig, TimesformerModel

    model = TimesformerModel(TimesformerConfig(**{**PATCH, "num_frames": 3}))
    return model, keywords(lambda: {"pixel_values": torch.randn(1, 3, 3, 32, 32)})


@case("hf_vivit")
def vivit() -> Built:
    from transformers import VivitConfig, VivitModel

    options = {**TINY, "image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8]}
    return VivitModel(VivitConfig(**options)), keywords(lambda: {"pixel_values": torch.randn(1, 4, 3, 32, 32)})
