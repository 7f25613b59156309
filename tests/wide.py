"""Tiny models of many architectures, made from configurations, with inputs for them; what the wide sweep runs over.

python tests/wide.py docs/support.md    writes the table of the architectures
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from torch import Tensor

from moelora import MoELoraConfig

VOCAB = 99
IMAGE = 32
IMAGE_TOKEN = 90
MARKED = re.compile(r"(<!-- architectures -->\n).*?(<!-- end of architectures -->)", re.DOTALL)


# ---- configurations --------------------------------------------------------------------------------------------------


def _all(names: str, value: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


# What makes any configuration small, under the names that configurations have for it.
_SMALL: dict[str, Any] = {
    **_all("hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim", 32),
    **_all("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth", 2),
    **_all("num_decoder_layers num_encoder_layers", 2),
    **_all("num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads", 4),
    **_all("num_key_value_heads multi_query_group_num", 2),
    **_all("intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size hidden_dim", 48),
    **_all("moe_intermediate_size shared_expert_intermediate_size", 48),
    **_all("head_dim d_kv qk_nope_head_dim v_head_dim", 8),
    **_all("num_experts num_local_experts n_routed_experts", 4),
    **_all("num_experts_per_tok num_experts_per_token moe_topk", 2),
    **_all("n_group topk_group", 1),
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "image_size": IMAGE,
    "patch_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def small(config_class: type, **overrides: Any) -> Any:
    """A configuration of this class that is small throughout, but for what is given."""
    there = config_class().to_dict()
    options = {
        name: value
        for name, value in _SMALL.items()
        if name in there and not isinstance(there[name], list | tuple | dict)
    }
    for name, part in getattr(config_class, "sub_configs", {}).items():
        if isinstance(overrides.get(name, {}), dict) and part is not transformers.AutoConfig:
            options[name] = small(part, **overrides.pop(name, {})).to_dict()
    return config_class(**(options | overrides))


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        name: the model's class in transformers.
        family: a line of docs/models.md.
        config: makes the configuration.
        inputs: makes the model's arguments; the same ones each time.
        targets: `target_modules`, where plain LoRA cannot have all linears.
        native: the model has experts of its own as parameters, which plain LoRA adapts and a mixture leaves frozen.
    """

    name: str
    family: str
    config: Callable[[], Any]
    inputs: Callable[[], dict[str, Tensor]]
    targets: str | list[str] = "all-linear"
    native: bool = False

    def build(self) -> Any:
        """The model in eval mode; the same weights each time."""
        torch.manual_seed(0)
        model = getattr(transformers, self.name)(self.config()).eval()
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():  # transformers starts so small that a wrong delta hides in rounding
            if parameter.dim() == 2 and parameter.is_floating_point():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        return model


def ids(length: int = 7, image: int = 0, seed: int = 1) -> Tensor:
    """[2, image + length] token ids, of which the first but one stand for an image."""
    found = torch.randint(3, 80, (2, image + length), generator=torch.Generator().manual_seed(seed))
    found[:, 1 : 1 + image] = IMAGE_TOKEN
    return found


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _text() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}


def _generating() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": torch.tensor([[1] * 7, [0] * 2 + [1] * 5]), "use_cache": False}


def _translating() -> dict[str, Any]:
    return _text() | {"decoder_input_ids": ids(5, seed=2), "use_cache": False}


def _picture() -> dict[str, Any]:
    return {"pixel_values": noise(2, 3, IMAGE, IMAGE)}


def _wave() -> dict[str, Any]:
    return {"input_values": noise(2, 4000)}


def _cases(
    family: str, inputs: Callable[[], dict[str, Any]], names: str, targets: Any = "all-linear", native: bool = False,
    **overrides: Any,
) -> list[Case]:  # fmt: skip
    def config(name: str) -> Callable[[], Any]:
        return lambda: small(getattr(transformers, name).config_class, **overrides)

    return [Case(name, family, config(name), inputs, targets, native) for name in names.split()]


_LATENT = {
    "num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 16,
    "q_lora_rank": 16, "head_dim": 4,
}  # fmt: skip
_INDEXED = _LATENT | {"index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
_SWIN = {"depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "patch_size": 2, "embed_dim": 16}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 4], "depths": [1, 1, 1, 1]}
_CONV = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4}

_LANGUAGE = [
    *_cases("language", _generating,
        "LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM GemmaForCausalLM Gemma2ForCausalLM "
        "Gemma3ForCausalLM PhiForCausalLM Phi3ForCausalLM GPT2LMHeadModel GPTNeoXForCausalLM OPTForCausalLM "
        "BloomForCausalLM FalconForCausalLM StableLmForCausalLM Starcoder2ForCausalLM CohereForCausalLM "
        "Cohere2ForCausalLM OlmoForCausalLM Olmo2ForCausalLM GraniteForCausalLM Glm4ForCausalLM "
        "NemotronForCausalLM SmolLM3ForCausalLM Ernie4_5ForCausalLM Exaone4ForCausalLM XGLMForCausalLM "
        "LlamaForSequenceClassification"),
    *_cases("language", _generating, "GPTJForCausalLM", rotary_dim=4),
    *_cases("language", _generating, "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]]),
]  # fmt: skip
_NATIVE = [
    *_cases("native mixture", _generating,
        "MixtralForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM OlmoeForCausalLM GptOssForCausalLM "
        "GraniteMoeForCausalLM MiniMaxForCausalLM", native=True),
    *_cases("native mixture", _generating, "Glm4MoeForCausalLM", native=True, first_k_dense_replace=1,
            n_shared_experts=1),
]  # fmt: skip
_LATENTS = [
    *_cases("multi-head latent attention", _generating, "MiniCPM3ForCausalLM", **_LATENT),
    *_cases("multi-head latent attention", _generating,
            "DeepseekV2ForCausalLM DeepseekV3ForCausalLM Glm4MoeLiteForCausalLM", native=True, **_LATENT),
    *_cases("multi-head latent attention", _generating, "DeepseekV32ForCausalLM GlmMoeDsaForCausalLM", native=True,
            **_INDEXED),
    *_cases("multi-head latent attention", _generating, "LongcatFlashForCausalLM", native=True,
            expert_ffn_hidden_size=16, **_LATENT),
    *_cases("multi-head latent attention", _generating, "KimiLinearForCausalLM", native=True,
            **_LATENT | {"head_dim": 8, "q_lora_rank": None, "layer_types": ["linear_attention", "full_attention"]}),
]  # fmt: skip
_STATE_SPACE = [
    *_cases("state space", lambda: {"input_ids": ids(), "use_cache": False}, "MambaForCausalLM FalconMambaForCausalLM",
            targets=["in_proj", "x_proj"]),
    *_cases("state space", lambda: {"input_ids": ids(), "use_cache": False}, "Mamba2ForCausalLM", targets=["in_proj"],
            num_heads=8, head_dim=8, expand=2, n_groups=2, state_size=8),
    *_cases("state space", _generating, "FalconH1ForCausalLM", targets=["q_proj", "v_proj", "in_proj", "up_proj"]),
    *_cases("state space", _generating, "RecurrentGemmaForCausalLM", num_hidden_layers=3, lru_width=32,
            block_types=["recurrent", "recurrent", "attention"]),
    *_cases("state space", _generating, "Qwen3NextForCausalLM", native=True, **_HYBRID),
    *_cases("state space", _generating, "Lfm2ForCausalLM"),
]  # fmt: skip
_ENCODERS = [
    *_cases("encoder", _text,
        "BertForSequenceClassification RobertaForSequenceClassification DistilBertForSequenceClassification "
        "ElectraForSequenceClassification AlbertForSequenceClassification DebertaForSequenceClassification "
        "DebertaV2ForSequenceClassification ModernBertForSequenceClassification MPNetForSequenceClassification "
        "EsmForSequenceClassification ConvBertForSequenceClassification RoFormerForSequenceClassification "
        "FNetForSequenceClassification FunnelForSequenceClassification XLNetForSequenceClassification "
        "NystromformerForSequenceClassification XLMForSequenceClassification"),
    *_cases("encoder", _text, "LongformerForSequenceClassification", attention_window=4),
    *_cases("encoder", _text, "BigBirdForSequenceClassification", block_size=2, num_random_blocks=1),
]  # fmt: skip
_ENCODER_DECODERS = [
    *_cases("encoder-decoder", _translating,
        "T5ForConditionalGeneration BartForConditionalGeneration PegasusForConditionalGeneration MarianMTModel "
        "M2M100ForConditionalGeneration LongT5ForConditionalGeneration UMT5ForConditionalGeneration "
        "ProphetNetForConditionalGeneration PegasusXForConditionalGeneration FSMTForConditionalGeneration "
        "T5GemmaForConditionalGeneration"),
    *_cases("encoder-decoder", _translating,
            "SwitchTransformersForConditionalGeneration NllbMoeForConditionalGeneration", native=True,
            expert_capacity=64),
    *_cases("encoder-decoder", _translating, "LEDForConditionalGeneration", attention_window=4),
]  # fmt: skip
_VISION = [
    *_cases("vision", _picture,
        "ViTForImageClassification DeiTForImageClassification BeitForImageClassification Dinov2ForImageClassification "
        "DINOv3ViTModel MobileViTForImageClassification PoolFormerForImageClassification CLIPVisionModel "
        "FocalNetForImageClassification SiglipForImageClassification SwiftFormerForImageClassification "
        "ResNetForImageClassification GroupViTVisionModel"),
    *_cases("vision", _picture, "SwinForImageClassification Swinv2ForImageClassification DonutSwinModel", **_SWIN),
    *_cases("vision", _picture, "SegformerForImageClassification GLPNForDepthEstimation",
            **_STAGES | {"decoder_hidden_size": 16}),
    *_cases("vision", _picture, "PvtV2ForImageClassification", **_STAGES),
    *_cases("vision", _picture, "ConvNextForImageClassification ConvNextV2ForImageClassification", **_CONV),
    *_cases("vision", _picture, "YolosForObjectDetection", image_size=[IMAGE, IMAGE], num_detection_tokens=5),
    *_cases("vision", _picture, "DPTForDepthEstimation", num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8] * 4, fusion_hidden_size=8),
    Case("DetrForObjectDetection", "vision", lambda: small(
        transformers.DetrConfig, num_queries=5, use_timm_backbone=False, backbone=None,
        backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"])), _picture),
    Case("SamModel", "vision", lambda: transformers.SamConfig(
        vision_config=small(transformers.SamVisionConfig, window_size=2, global_attn_indexes=[1], output_channels=16,
                            num_pos_feats=8, mlp_dim=48).to_dict(),
        prompt_encoder_config={"hidden_size": 16, "image_size": IMAGE, "patch_size": 8, "image_embedding_size": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}),
        _picture),
]  # fmt: skip
_SOUND = [
    *_cases("audio", _wave,
        "Wav2Vec2ForSequenceClassification HubertForSequenceClassification WavLMForSequenceClassification "
        "SEWForSequenceClassification UniSpeechForSequenceClassification Wav2Vec2ConformerForSequenceClassification"),
    *_cases("audio", lambda: {"input_features": noise(2, 8, 40), "decoder_input_ids": ids(5)},
            "WhisperForConditionalGeneration", max_source_positions=20, num_mel_bins=8, max_target_positions=32,
            decoder_start_token_id=1),
    *_cases("audio", lambda: {"input_values": noise(2, 32, 16)}, "ASTForAudioClassification", max_length=32,
            num_mel_bins=16, frequency_stride=8, time_stride=8),
    *_cases("audio", lambda: {"input_features": noise(2, 40, 8), "decoder_input_ids": ids(5)},
            "Speech2TextForConditionalGeneration", input_feat_per_channel=8, conv_channels=16, max_source_positions=64,
            max_target_positions=32, decoder_start_token_id=1),
    *_cases("audio", lambda: {"input_features": noise(2, 20, 16)}, "Wav2Vec2BertForSequenceClassification",
            feature_projection_input_dim=16, classifier_proj_size=8),
]  # fmt: skip
_SERIES = [
    *_cases("time series", lambda: {"past_values": noise(2, 32, 3)}, "PatchTSTForPrediction", num_input_channels=3,
            context_length=32, patch_length=8, patch_stride=8, prediction_length=4, channel_attention=True),
]  # fmt: skip


# ---- vision and language ---------------------------------------------------------------------------------------------


def _seeing(patches: int, *shape: int, **more: Any) -> Callable[[], dict[str, Any]]:
    """Ids with so many tokens for the image, and an image of this shape."""

    def inputs() -> dict[str, Any]:
        found = ids(image=patches)
        return {"input_ids": found, "attention_mask": torch.ones_like(found), "pixel_values": noise(*shape)} | {
            name: make(found) for name, make in more.items()
        }

    return inputs


def _joined(name: str, vision: str, text: str, **options: Any) -> Callable[[], Any]:
    """The configuration called name of an image tower and a language model, whose configurations have these names."""

    def config() -> Any:
        towers = [small(getattr(transformers, each)) for each in (vision, text)]
        own = getattr(transformers, name)
        made = [
            each if own.sub_configs[part] is transformers.AutoConfig else each.to_dict()
            for each, part in zip(towers, ("vision_config", "text_config"), strict=True)
        ]
        return own(vision_config=made[0], text_config=made[1], **{"image_token_id": IMAGE_TOKEN} | options)

    return config


def _qwen(name: str, text: dict[str, Any], **vision: Any) -> Callable[[], Any]:
    def config() -> Any:
        language = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 128, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        }  # fmt: skip
        tower = {"depth": 2, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
        own = getattr(transformers, name)
        return own(
            text_config=language | text, vision_config=tower | vision, image_token_id=IMAGE_TOKEN, video_token_id=91,
            vision_start_token_id=92, vision_end_token_id=93,
        )  # fmt: skip

    return config


_seeing_as_qwen = _seeing(
    4, 32, 3 * 2 * 4 * 4,
    image_grid_thw=lambda _: torch.tensor([[1, 4, 4], [1, 4, 4]]),
    mm_token_type_ids=lambda found: (found == IMAGE_TOKEN).long(),
)  # fmt: skip
_token_types = {"token_type_ids": torch.zeros_like}

_VISION_LANGUAGE = [
    Case(f"{name}", "vision-language", config, inputs)
    for name, config, inputs in (
        ("LlavaForConditionalGeneration",
         _joined("LlavaConfig", "CLIPVisionConfig", "LlamaConfig", vision_feature_layer=-1),
         _seeing(16, 2, 3, IMAGE, IMAGE)),
        ("LlavaNextForConditionalGeneration",
         _joined("LlavaNextConfig", "CLIPVisionConfig", "LlamaConfig", vision_feature_layer=-1,
                 image_grid_pinpoints=[[IMAGE, IMAGE]]),
         _seeing(36, 2, 2, 3, IMAGE, IMAGE, image_sizes=lambda _: torch.tensor([[IMAGE, IMAGE]] * 2))),
        ("PaliGemmaForConditionalGeneration",
         _joined("PaliGemmaConfig", "SiglipVisionConfig", "GemmaConfig", projection_dim=32, hidden_size=32),
         _seeing(16, 2, 3, IMAGE, IMAGE, **_token_types)),
        ("Gemma3ForConditionalGeneration",
         _joined("Gemma3Config", "SiglipVisionConfig", "Gemma3TextConfig", image_token_index=IMAGE_TOKEN,
                 boi_token_index=91, eoi_token_index=92, mm_tokens_per_image=4),
         _seeing(4, 2, 3, IMAGE, IMAGE, **_token_types)),
        ("Idefics3ForConditionalGeneration",
         _joined("Idefics3Config", "Idefics3VisionConfig", "LlamaConfig", scale_factor=2),
         _seeing(4, 2, 1, 3, IMAGE, IMAGE)),
        ("SmolVLMForConditionalGeneration",
         _joined("SmolVLMConfig", "SmolVLMVisionConfig", "LlamaConfig", scale_factor=2),
         _seeing(4, 2, 1, 3, IMAGE, IMAGE)),
        ("InternVLForConditionalGeneration",
         lambda: transformers.InternVLConfig(
             vision_config=small(transformers.InternVLVisionConfig, image_size=[IMAGE, IMAGE], patch_size=[8, 8]),
             text_config=small(transformers.Qwen2Config), image_token_id=IMAGE_TOKEN, downsample_ratio=0.5),
         _seeing(4, 2, 3, IMAGE, IMAGE)),
        ("Qwen2VLForConditionalGeneration",
         _qwen("Qwen2VLConfig", {}, embed_dim=32, hidden_size=32, mlp_ratio=2), _seeing_as_qwen),
        ("Qwen2_5_VLForConditionalGeneration",
         _qwen("Qwen2_5_VLConfig", {}, hidden_size=32, out_hidden_size=32, intermediate_size=48, window_size=16,
               fullatt_block_indexes=[1]), _seeing_as_qwen),
        ("Qwen3VLForConditionalGeneration",
         _qwen("Qwen3VLConfig", {"head_dim": 8}, hidden_size=32, out_hidden_size=32, intermediate_size=48,
               num_position_embeddings=16, deepstack_visual_indexes=[0]), _seeing_as_qwen),
        ("CLIPModel", _joined("CLIPConfig", "CLIPVisionConfig", "CLIPTextConfig", projection_dim=16),
         _seeing(0, 2, 3, IMAGE, IMAGE)),
        ("SiglipModel", _joined("SiglipConfig", "SiglipVisionConfig", "SiglipTextConfig"),
         _seeing(0, 2, 3, IMAGE, IMAGE)),
        ("Blip2ForConditionalGeneration",
         lambda: transformers.Blip2Config(
             vision_config=small(transformers.Blip2VisionConfig).to_dict(),
             qformer_config=small(transformers.Blip2QFormerConfig, encoder_hidden_size=32).to_dict(),
             text_config=small(transformers.OPTConfig), num_query_tokens=4, image_token_index=IMAGE_TOKEN),
         _seeing(4, 2, 3, IMAGE, IMAGE)),
        ("GitForCausalLM", lambda: small(transformers.GitConfig, vision_config={}),
         _seeing(0, 2, 3, IMAGE, IMAGE)),
        ("ViltModel", lambda: small(transformers.ViltConfig),
         _seeing(0, 2, 3, IMAGE, IMAGE)),
        ("MllamaForConditionalGeneration",
         lambda: transformers.MllamaConfig(
             vision_config=small(transformers.MllamaVisionConfig, intermediate_layers_indices=[0], vision_output_dim=64,
                                 num_global_layers=1, max_num_tiles=2,
                                 supported_aspect_ratios=[[1, 1], [1, 2]]).to_dict(),
             text_config=small(transformers.MllamaConfig.sub_configs["text_config"], cross_attention_layers=[1],
                               rope_parameters={"rope_type": "default", "rope_theta": 1e4}).to_dict(),
             image_token_index=IMAGE_TOKEN),
         _seeing(1, 2, 1, 2, 3, IMAGE, IMAGE,
                 aspect_ratio_ids=lambda _: torch.ones(2, 1, dtype=torch.long),
                 aspect_ratio_mask=lambda _: torch.tensor([[[1, 0]], [[1, 0]]]),
                 cross_attention_mask=lambda found: torch.ones(2, found.shape[1], 1, 2, dtype=torch.long))),
    )
]  # fmt: skip

PADDED_ONLY = [
    # Plain LoRA cannot train RWKV, whose forward writes into a view.
    *_cases("state space", _generating, "RwkvForCausalLM", attention_hidden_size=32),
    # Sounds are normalised each by itself, so that what is padded reaches nothing in the base.
    *_cases(
        "audio",
        _wave,
        "Wav2Vec2ForSequenceClassification",
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        apply_spec_augment=False,
    ),
]
CASES = [
    *_LANGUAGE, *_NATIVE, *_LATENTS, *_STATE_SPACE, *_ENCODERS, *_ENCODER_DECODERS, *_VISION, *_SOUND, *_SERIES,
    *_VISION_LANGUAGE,
]  # fmt: skip
"""All architectures of the sweep: plain LoRA and a mixture adapt each."""


# ---- the table -------------------------------------------------------------------------------------------------------

_TEST = "tested by `tests/test_models_wide.py::test_does_what_lora_does`"


def own_routers(case: Case) -> str:
    """The linears of an architecture that have routers of their own, by the ends of their names."""
    model = get_peft_model(case.build(), MoELoraConfig(r=1, num_experts=2, target_modules=case.targets))
    parts = [re.sub(r"\.\d+", "", name).split(".") for name in model.peft_config["default"].own_routers]
    return ", ".join(f"`{name}`" for name in sorted({".".join(part[-2:]) for part in parts}))


def table() -> str:
    """One row for architectures of a family that are routed alike."""
    rows: dict[tuple[str, str, bool], list[str]] = {}
    for case in CASES:
        rows.setdefault((case.family, own_routers(case), case.native), []).append(case.name)
    lines = ["| what | routed as |", "|---|---|"]
    for (family, own, is_native), names in rows.items():
        routed = f"; routers of their own: {own}" if own else ""
        frozen = "; the model's experts stay frozen" if is_native else ""
        lines.append(f"| {family}: {', '.join(names)} | {_TEST}{routed}{frozen} |")
    return "\n".join(lines)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    written = MARKED.sub(lambda match: f"{match[1]}{table()}\n{match[2]}", page.read_text(encoding="utf-8"))
    page.write_text(written, encoding="utf-8")
