"""Any model of Transformers, small, from its config alone, and inputs that it takes.

`build(model_type)` shrinks the default config by the names of its fields; what does not follow from
a name stands in `OVERRIDES`. `inputs(model)` tries shapes until the forward takes one.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import re

import torch
import transformers
from transformers.models.auto import modeling_auto

WIDTH, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
IMAGE, PATCH = 64, 8
VOCABULARY = 256
# Heads from the most complete to none; a type takes the first that it has.
HEADS_BY_PREFERENCE = (
    "SPEECH_SEQ_2_SEQ", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM",
    "MASKED_LM", "CAUSAL_LM", "TEXT_TO_SPECTROGRAM", "TEXT_TO_WAVEFORM", "CTC", "RNNT", "TDT",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "ZERO_SHOT_OBJECT_DETECTION", "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION", "OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION", "INSTANCE_SEGMENTATION", "DEPTH_ESTIMATION", "POSE_ESTIMATION",
    "KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "IMAGE_TO_IMAGE", "MASK_GENERATION",
    "TIME_SERIES_PREDICTION", "RETRIEVAL", "VISUAL_QUESTION_ANSWERING", "SEQUENCE_CLASSIFICATION",
    "QUESTION_ANSWERING", "PRETRAINING", "BACKBONE", "IMAGE_MATTING", "NORMAL_ESTIMATION",
    "POINTMAP_ESTIMATION", "DECISION", "TEXT_RECOGNITION", "TABLE_RECOGNITION",
)  # fmt: skip

# (pattern of a field's whole name, value for an integer). The first that matches decides.
INTEGERS = [
    (r"vocab_size.*|.*_vocab_size|num_embeddings|codebook_size", VOCABULARY),
    (r"(num|n)_(experts|routed_experts|local_experts)|(moe_)?num_experts|num_routed_experts", 4),
    (r".*(experts_per_tok(en)?|moe_top_?k|top_k_experts)|moe_k|moe_topk", 2),
    (r"n_group|topk_group|num_expert_group|n_expert_groups", 1),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers", 0),
    (r"max_window_layers|num_adapter_layers|insert_layer_id", None),
    (r"first_k_dense_replace|decoder_sparse_step|moe_layer_(freq|start_index|interval)", 1),
    (r".*(num_key_value_heads|n_kv_heads|num_kv_heads|n_head_kv)", KV_HEADS),
    (r".*(attention_heads|num_heads|n_heads?|_heads|nhead)", HEADS),
    (r"mamba_(d_)?head(_dim)?", 2 * WIDTH // HEADS),
    (r"mamba_n_groups|n_groups|mamba_ngroups", 1),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"window_size", 4),
    (r"head_dim|.*_head_dim|d_kv|dim_head|attention_head_size", HEAD_DIM),
    (r"(num_|n_).*layers?|.*_layers|depth|.*_depth|num_.*blocks|encoder_depth", 2),
    (r".*(intermediate_size|ffn_dim|mlp_dim|ffn_hidden_size|d_ff|ffn_size|inner_dim|n_inner)", 96),
    (r".*(q_lora_rank|kv_lora_rank)", 16),
    (r".*(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_size|embedding_dim)", WIDTH),
    (r"(projection|output|out|emb|model|mm|proj|fusion|attention|decoder|encoder|text|vision)_dim",
     WIDTH),
    (r"dim|width|projection_size|output_hidden_size|pooler_output_size|decoder_hidden|lru_width",
     WIDTH),
    (r"(vq_|codebook_|latent_|mask_|query_)(embed_)?dim|projector_dim|embed_size", WIDTH),
    (r"(pretrain_)?image_size|input_image_size|img_size", IMAGE),
    (r"patch_size", PATCH),
    (r"max_position_embeddings|n_positions|max_(source|target)_positions|max_seq.*", 128),
    (r"num_queries|num_query_tokens|num_latents|num_image_tokens", 8),
    (r"sliding_window|attention_window_size|local_attention|index_topk", 8),
    (r"index_head_dim", HEAD_DIM),
    (r"sampling_rate|num_mel_bins", None),
]  # fmt: skip

# Where a default is None and the class does not compute it.
IF_NONE = {
    "decoder_start_token_id": 1, "vocab_size": VOCABULARY, "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS, "prediction_length": 4, "context_length": 8,
}  # fmt: skip

# What the names do not say: (type -> fields).
_MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
}
_MROPE_HALF = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 0.5,
    }
}  # fmt: skip
OVERRIDES: dict[str, dict] = {
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "swin": {"image_size": 224, "window_size": 7},
    "donut-swin": {"image_size": 224, "window_size": 7},
    "esm": {"pad_token_id": 1, "mask_token_id": 2},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}
    },
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "mamba2": {"head_dim": 32},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (8, 16)},
    "nemotron_h": {"n_groups": 1},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "wav2vec2-bert": {"vocab_size": 64},
    "wav2vec2-conformer": {"vocab_size": 64},
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), _MROPE),
    **dict.fromkeys(
        ("glm4v_text", "glm4v_moe_text", "glm_image_text", "glm_ocr_text"), _MROPE_HALF
    ),
    "qwen2_vl": {"text_config": _MROPE},
    "qwen2_5_vl": {"text_config": _MROPE},
    "glm4v": {"text_config": _MROPE_HALF},
    "glm46v": {"text_config": _MROPE_HALF},
    "glm4v_moe": {"text_config": _MROPE_HALF},
    "glm_ocr": {"text_config": _MROPE_HALF},
}
EXPENSIVE = 60_000_000
INERT = {"mra": "its attention gives zeros without a CUDA kernel"}


class NotBuilt(Exception):
    """The reason why a type has no small model."""


@functools.cache
def classes() -> dict[str, str]:
    """model type -> name of its class with the most complete head; each class once."""
    found: dict[str, str] = {}
    for head in (*(f"FOR_{name}_" for name in HEADS_BY_PREFERENCE), ""):
        for kind, name in getattr(modeling_auto, f"MODEL_{head}MAPPING_NAMES").items():
            found.setdefault(kind, name if isinstance(name, str) else name[0])
    owners: dict[str, str] = {}
    for kind, name in sorted(found.items()):
        config = None
        with contextlib.suppress(ImportError):
            config = getattr(getattr(transformers, name, None), "config_class", None)
        if name not in owners or kind == getattr(config, "model_type", None):
            owners[name] = kind
    return {kind: name for kind, name in found.items() if owners[name] == kind}


def _shrunk_list(name: str, values: list) -> list | None:
    numbers = all(isinstance(v, int) and not isinstance(v, bool) for v in values)
    if not values or not numbers:
        return None
    if re.fullmatch(r"depths?|.*num_blocks|.*layers_per_stage|blocks_per_stage|.*_depths", name):
        return [1] * len(values)
    if re.search(r"hidden_sizes|embed_dims?|dims|channels|neck_hidden", name) and min(values) > 32:
        unit = min(values)
        return [max(8, round(32 * v / unit / 8) * 8) for v in values]
    if re.fullmatch(r".*num_(attention_)?heads", name) and min(values) > 2:
        return [max(1, 2 * v // min(values)) for v in values]
    if re.fullmatch(r"conv_dim", name):
        return [32] * len(values)
    if re.fullmatch(r"(image|patch)_size", name) and min(values) > PATCH:
        return [IMAGE if name.startswith("image") else PATCH] * len(values)
    return None


def _kinds(config) -> dict:
    """Lists with an entry a layer, cut to one layer of each kind (at least two layers)."""
    depth = getattr(config, "num_hidden_layers", None)
    lists = {
        name: list(value)
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == depth and "layer" in name
    }
    if not lists:
        return {}
    rows = list(zip(*lists.values(), strict=True))
    keep = sorted({str(row): i for i, row in reversed(list(enumerate(rows)))}.values())[:4]
    keep = keep if len(keep) > 1 else [0, min(1, depth - 1)]
    fields = {name: [value[i] for i in keep] for name, value in lists.items()}
    return {**fields, "num_hidden_layers": len(keep)}


def _mrope(value, pairs: int):
    """Rotary parameters with their sections scaled to `pairs` frequencies."""
    value = copy.deepcopy(value)
    for part in [value, *(v for v in value.values() if isinstance(v, dict))]:
        section = part.get("mrope_section")
        if section:
            scaled = [max(1, s * pairs // sum(section)) for s in section]
            scaled[-1] += pairs - sum(scaled)
            part["mrope_section"] = scaled
    return value


def shrink(config, overrides: dict, kinds: bool = True) -> dict:
    """Fields with which the config's class gives a small one."""
    if dataclasses.is_dataclass(config):
        declared = {f.name: f.default for f in dataclasses.fields(config)}
    else:
        signature = inspect.signature(type(config).__init__).parameters
        declared = {n: p.default for n, p in signature.items() if n not in ("self", "kwargs")}
    fields, special = {}, itertools.count(100)
    for name, value in vars(config).items():
        if name.startswith("_") or name in ("model_type", "transformers_version"):
            continue
        if isinstance(value, transformers.PretrainedConfig):
            given = overrides.get(name, {})
            fields[name] = type(value)(**shrink(value, given, kinds))
        elif name not in declared and name != "vocab_size":
            pass
        elif value is None and name in IF_NONE:
            fields[name] = IF_NONE[name]
        elif isinstance(value, bool):
            pass
        elif re.fullmatch(r".*_token_(id|index)|.*_id", name) and isinstance(value, int):
            if value >= 100:
                fields[name] = next(special)
        elif isinstance(value, int):
            small = next((n for p, n in INTEGERS if re.fullmatch(p, name)), None)
            heads = getattr(config, "num_attention_heads", None)
            if small == KV_HEADS and "heads" in name and value == heads:
                small = HEADS
            if small is not None and value > small:
                fields[name] = small
        elif isinstance(value, (list, tuple)):
            small = _shrunk_list(name, list(value))
            if small is not None:
                fields[name] = type(value)(small)
        elif isinstance(value, dict) and "rope" in name:
            fields[name] = _mrope(value, HEAD_DIM // 2)
        elif isinstance(value, float) and "drop" in name:
            fields[name] = 0.0
    if kinds:
        fields |= {n: v for n, v in _kinds(config).items() if n in declared}
    parts = {n for n, v in fields.items() if isinstance(v, transformers.PretrainedConfig)}
    fields |= {n: v for n, v in overrides.items() if n not in parts}
    return fields


def build(kind: str, name: str | None = None):
    """The type's model from seed 0, in evaluation mode, a few million parameters at most."""
    name = name or classes()[kind]
    if kind in INERT:
        raise NotBuilt(INERT[kind])
    cls = getattr(transformers, name, None)
    if cls is None:
        raise NotBuilt(f"transformers {transformers.__version__} has no {name}")
    if getattr(cls, "is_dummy", False) or not hasattr(cls, "config_class"):
        raise NotBuilt("needs a package that is not installed")
    overrides = OVERRIDES.get(kind, {})
    try:
        default = transformers.CONFIG_MAPPING[kind]()
    except Exception as error:
        raise NotBuilt(f"default config: {short(error)}") from error
    failures = []
    for kinds in (True, False):
        try:
            return _construct(cls, type(default)(**shrink(default, overrides, kinds)))
        except Exception as error:
            failures.append(error)
    raise NotBuilt(short(failures[0])) from failures[0]


def _construct(cls, config):
    config._attn_implementation = "eager"
    count = 0
    with contextlib.suppress(Exception), torch.device("meta"):  # some read values as they start
        count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if count > EXPENSIVE:
        raise NotBuilt(f"{count / 1e6:.0f} M parameters after shrinking")
    torch.manual_seed(0)
    return cls(config).eval().float()


def short(error: Exception) -> str:
    text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")
    return text if len(text) < 160 else text[:157] + "..."


# ------------------------------------------------------------------------------------------ inputs


def _first(config, *names, default=None):
    """The first of the attributes that the config or one of its parts has."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if isinstance(value, (int, list, tuple)) and not isinstance(value, bool) and value:
                return value
    return default


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)[-2:]


def _tokens(config, generator, rows=2, length=8):
    top = min(_first(config, "vocab_size", "text_vocab_size", default=VOCABULARY), 90)
    return torch.randint(min(5, top - 1), top, (rows, length), generator=generator)


def _options(name: str, model, generator) -> list:
    """Values worth a try for one argument of forward."""
    config = model.config
    randn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    channels = _first(config, "num_channels", "in_channels", "in_chans", default=3)
    channels = channels if isinstance(channels, int) else channels[0]
    H, W = _pair(_first(config, "image_size", "input_image_size", "img_size", default=IMAGE))
    mels = _first(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "mel_dim",
                  "feature_projection_input_dim", "n_mels", default=80)  # fmt: skip
    if name in ("input_ids", "decoder_input_ids"):
        books = _first(config, "num_codebooks", "n_codebooks", default=4)
        ids = _tokens(config, generator)
        return [ids, _tokens(config, generator, 2, 8 * books).reshape(2, 8, books)]
    if name == "hidden_states" and not GRIDS & set(inspect.signature(model.forward).parameters):
        return []
    if name in ("pixel_values", "hidden_states"):
        frames = _first(config, "num_frames", default=2)
        patch = _pair(_first(config, "patch_size", default=PATCH))[0]
        time = _first(config, "temporal_patch_size", default=1)
        size = channels * time * patch * patch
        patches = [randn(16, size)]
        if GRIDS & set(inspect.signature(model.forward).parameters):
            return patches
        return [
            randn(2, channels, H, W), randn(2, frames, channels, H, W), randn(2, 1, channels, H, W),
            randn(2, channels, 2 * H, 2 * W), *patches, randn(2, 16, size),
            randn(2, channels, 224, 224),
        ]  # fmt: skip
    if name in ("input_features", "input_values", "audio_values", "audio_features"):
        wave = [randn(2, 4000), randn(2, 1, 4000)]
        length = 2 * _first(config, "max_source_positions", default=128)
        spectrum = [
            randn(2, mels, length), randn(2, 64, mels), randn(2, mels, 64), randn(2, 1, 64, mels),
            randn(2, mels, 3000), randn(2, 1024, mels), randn(2, 1, 1001, mels),
        ]  # fmt: skip
        return wave + spectrum if name == "input_values" else spectrum + wave
    if name in ("image_grid_thw", "grid_thw"):
        return [torch.tensor([[1, 4, 4]])]
    if name == "bbox":
        return [torch.zeros(2, 8, 4, dtype=torch.long)]
    return []


GRIDS = {"image_grid_thw", "grid_thw"}
TOGETHER = ("input_ids", "pixel_values", "hidden_states", "input_features", "input_values",
            "decoder_input_ids", "bbox", "image_grid_thw", "grid_thw")  # fmt: skip
MISMATCH = re.compile(r"tokens:? (\d+)\D+features:?\D*(\d+)")


def inputs(model) -> dict:
    """Arguments with which the model's forward runs: the most kinds of input that it takes."""
    generator = torch.Generator().manual_seed(1)
    accepted = inspect.signature(model.forward).parameters
    if (made := INPUTS.get(model.config.model_type)) is not None:
        return made(model, generator)
    names = [n for n in TOGETHER if n in accepted]
    if model.main_input_name in accepted and model.main_input_name not in names:
        names.insert(0, model.main_input_name)
    options = {n: o for n in names if (o := _options(n, model, generator))}
    failure = None
    # All kinds at once first, then without one, two, ...
    for left_out in range(len(options)):
        for without in itertools.combinations(reversed(list(options)), left_out):
            chosen = {n: o for n, o in options.items() if n not in without}
            for values in itertools.islice(itertools.product(*chosen.values()), 24):
                given = dict(zip(chosen, values, strict=True))
                try:
                    return _accepted(model, given)
                except Exception as error:
                    failure = failure or error
    raise NotBuilt(
        f"no inputs found: {short(failure)}" if failure else "no inputs known"
    ) from failure


def _accepted(model, given: dict) -> dict:
    """`given`, with the placeholder tokens that the model asks for; raises what forward raises."""
    accepted = inspect.signature(model.forward).parameters
    if "mm_token_type_ids" in accepted and GRIDS & set(given):
        given = {**given, "mm_token_type_ids": torch.zeros(given["input_ids"].shape).int()}
    for _ in range(2):
        try:
            torch.manual_seed(0)
            with torch.no_grad():
                model(**given)
            return given
        except ValueError as error:
            found = MISMATCH.search(str(error).replace("\n", " "))
            token = _first(model.config, "image_token_id", "image_token_index", "audio_token_id",
                           "audio_token_index")  # fmt: skip
            if found is None or token is None or "input_ids" not in given:
                raise
            wanted = int(found[2])
            # Told in elements by some; in tokens by others.
            count = wanted // WIDTH if wanted % WIDTH == 0 and wanted > 4 * WIDTH else wanted
            rows = 1 if count % 2 or GRIDS & set(given) else 2
            ids = given["input_ids"][:rows]
            places = torch.full((rows, count // rows), token)
            ids = torch.cat([ids[:, :2], places, ids[:, 2:]], 1)
            given = {**given, "input_ids": ids}
            if "mm_token_type_ids" in accepted:
                given["mm_token_type_ids"] = (ids == token).int()
    raise NotBuilt("placeholders do not fit")


def placeholders(config) -> list[int] | None:
    """The tokens that stand for parts of images and sounds: no text to generate."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "to_dict"))]
    found = {
        value
        for part in parts
        for name, value in vars(part).items()
        if isinstance(value, int) and PLACEHOLDER.fullmatch(name)
    }
    return sorted(token for token in found if 0 <= token < VOCABULARY) or None


PLACEHOLDER = re.compile(r"(image|video|audio|vision)(_\w+)?_token_(id|index)")
INPUTS: dict = {
    # As long as its positions are in training.
    "reformer": lambda model, generator: {"input_ids": _tokens(model.config, generator, 2, 128)},
    # Its state is changed in place where it is kept.
    "rwkv": lambda model, generator: {
        "input_ids": _tokens(model.config, generator), "use_cache": False
    },
}  # fmt: skip
