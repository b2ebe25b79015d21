"""What Hugging Face's configs and tensors of each family mean here, both ways. Data and arithmetic
on shapes; no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from w2sjax.models.config import ModelConfig, RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def from_hf(fields: Mapping[str, Any], **changes: Any) -> ModelConfig:
    """The model that a Hugging Face config describes.

    Args:
      fields: of `config.json`, with transformers' defaults filled in (`PretrainedConfig.to_dict`).
      **changes: fields of `ModelConfig` to set beside (`param_dtype`, `remat`, …).

    Returns:
      The config.

    Raises:
      ValueError: an unknown architecture, or something in the config that this model cannot do; the
        message names the field.
    """
    family = fields.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(
            f"model_type is {family!r}; known: {', '.join(ARCHITECTURES)}. Other architectures "
            "enter as an apply_fn of their own."
        )
    gemma = family.startswith("gemma")
    for field, plain in (
        ("attention_dropout", 0.0),
        ("pretraining_tp", 1),
        ("use_bidirectional_attention", False),
    ):
        if fields.get(field) not in (None, plain):
            raise ValueError(f"{field} is {fields[field]!r}; only {plain!r} is supported")
    activation = fields.get("hidden_activation") if gemma else fields.get("hidden_act")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"hidden activation is {activation!r}; known: {', '.join(_ACTIVATIONS)}")
    layers = fields["num_hidden_layers"]
    window, local_layers = _windows(fields, layers)
    rope_theta, scaling, local_theta = _rope(fields, any(local_layers))
    attention_bias = bool(fields.get("attention_bias", False))
    values: dict[str, Any] = dict(
        family=family,
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        num_layers=layers,
        num_heads=fields["num_attention_heads"],
        num_kv_heads=fields.get("num_key_value_heads") or fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        max_length=fields["max_position_embeddings"],
        head_width=fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"],
        activation=_ACTIVATIONS[activation],
        rope_theta=rope_theta,
        rope_scaling=scaling,
        local_rope_theta=local_theta,
        window=window,
        local_layers=local_layers if window is not None and not all(local_layers) else (),
        norm_eps=fields["rms_norm_eps"],
        norm_plus_one=gemma,
        qk_norm=family in ("qwen3", "gemma3_text"),
        post_norms=gemma,
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias=bool(fields.get("mlp_bias", False)),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
    )
    if gemma:
        values |= dict(
            attention_scale=fields["query_pre_attn_scalar"] ** -0.5,
            attention_softcap=fields.get("attn_logit_softcapping"),
            logit_softcap=fields.get("final_logit_softcapping"),
            embedding_scale=math.sqrt(fields["hidden_size"]),
        )
    return ModelConfig(**(values | changes))


def _windows(fields: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window, None where no layer has one, and which layers do."""
    window = fields.get("sliding_window")
    if fields["model_type"].startswith("qwen") and not fields.get("use_sliding_window"):
        window = None
    kinds = fields.get("layer_types")
    if kinds is not None:
        unknown = set(kinds) - {_LOCAL, _GLOBAL}
        if unknown:
            raise ValueError(f"layer_types has {sorted(unknown)}; known: {_LOCAL}, {_GLOBAL}")
        local = tuple(kind == _LOCAL for kind in kinds)
        if any(local) and not fields.get("sliding_window"):
            raise ValueError("layer_types has local layers, but sliding_window is not set")
        return (fields["sliding_window"] if any(local) else None), local
    return window, (window is not None,) * layers


def _rope(
    fields: Mapping[str, Any], has_local: bool
) -> tuple[float, RopeScaling | None, float | None]:
    """Base, stretching, and the base of local layers where it is another."""
    rope = fields.get("rope_parameters") or {}
    if _GLOBAL in rope:  # one entry per kind of layer
        theta, scaling = _one_rope(rope[_GLOBAL])
        local_theta, local_scaling = _one_rope(rope.get(_LOCAL) or {})
        if local_scaling is not None:
            raise ValueError("rope_parameters of local layers are scaled; that is not supported")
        return theta, scaling, local_theta if has_local else None
    theta, scaling = _one_rope(rope)
    return theta, scaling, None


def _one_rope(rope: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    theta, kind = float(rope.get("rope_theta") or 10_000.0), rope.get("rope_type", "default")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise ValueError(f"rope_type is {kind!r}; known: default, linear, llama3")


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields of `config.json`: the inverse of `from_hf`.

    Args:
      config: a plain model, without adapters.

    Returns:
      JSON values, `model_type` and `architectures` among them.

    Raises:
      ValueError: the model is not of its family's shape; the message names the field.
    """
    if config.family not in ARCHITECTURES:
        raise ValueError(
            f"ModelConfig.family is {config.family!r}; known: {', '.join(ARCHITECTURES)}"
        )
    gemma = config.family.startswith("gemma")
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_length,
        "head_dim": config.head_size,
        "hidden_activation" if gemma else "hidden_act": names[config.activation],
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.output_bias,
        "sliding_window": config.window,
    }
    if config.family == "llama":
        fields["mlp_bias"] = config.mlp_bias
    if config.family.startswith("qwen"):
        fields["use_sliding_window"] = config.window is not None
        fields["max_window_layers"] = 0 if config.window is not None else config.num_layers
    if config.family not in ("llama", "mistral"):
        kinds = [_LOCAL if local else _GLOBAL for local in config.is_local]
        fields["layer_types"] = kinds
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
    fields["rope_parameters"] = rope
    if config.family == "gemma3_text":
        local_theta = config.local_rope_theta or config.rope_theta
        local = {"rope_type": "default", "rope_theta": local_theta}
        fields["rope_parameters"] = {_GLOBAL: rope, _LOCAL: local}
    if gemma:
        scale = config.attention_scale or config.head_size**-0.5
        fields |= {
            "query_pre_attn_scalar": round(scale**-2),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    _check_round_trip(config, fields)
    return fields


def _check_round_trip(config: ModelConfig, fields: Mapping[str, Any]) -> None:
    """Raises ValueError where the family's config cannot say what the model does."""
    again = from_hf(fields)
    for field in again.__dataclass_fields__:
        if field in ("param_dtype", "compute_dtype", "remat", "unroll", "attention", "lora"):
            continue  # how it is computed, not what
        ours, theirs = getattr(config, field), getattr(again, field)
        if field == "head_width":
            ours, theirs = config.head_size, again.head_size
        if field == "attention_scale":
            ours = ours or config.head_size**-0.5
            theirs = theirs or again.head_size**-0.5
        same = ours == theirs
        if isinstance(ours, float) and isinstance(theirs, float):
            same = math.isclose(ours, theirs, rel_tol=1e-6)
        if not same:
            raise ValueError(
                f"ModelConfig.{field} is {ours!r}, which a config of family {config.family!r} "
                f"cannot say (it would be read as {theirs!r})"
            )


class Tensor(NamedTuple):
    """One parameter of ours, of one layer where they are stacked, and its counterpart.

    Attributes:
      name: of their tensor; with `{layer}` where there is one per layer.
      shape: of ours, without the axis over layers.
      axes: per axis of theirs, which axes of ours it runs over, the slowest first.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Shape of their tensor."""
        return tuple(math.prod(self.shape[axis] for axis in group) for group in self.axes)

    def their_slices(self, ours: Sequence[slice]) -> tuple[slice, ...]:
        """Which part of theirs holds a part of ours; only the slowest axis of each may be cut."""
        found = []
        for slowest, *others in self.axes:
            step = math.prod(self.shape[axis] for axis in others)
            start, stop, _ = ours[slowest].indices(self.shape[slowest])
            if any(
                ours[axis].indices(self.shape[axis])[:2] != (0, self.shape[axis]) for axis in others
            ):
                raise ValueError(f"{self.name}: {tuple(ours)} is no slice of their tensor")
            found.append(slice(start * step, stop * step))
        return tuple(found)

    def to_ours(self, theirs: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Their array, or a part of it, in our layout; `shape` is that of the part of ours."""
        order = [axis for group in self.axes for axis in group]
        return theirs.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        """Our array of one layer, or a part of it, in their layout."""
        order = [axis for group in self.axes for axis in group]
        shape = [math.prod(ours.shape[axis] for axis in group) for group in self.axes]
        return ours.transpose(order).reshape(shape)


def tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Our parameter path → the tensor that holds it, for all parameters of a plain model."""
    width, head, hidden = config.width, config.head_size, config.mlp_width
    same, swapped = ((0,), (1,)), ((1,), (0,))
    found = {
        "embed/embedding": Tensor("model.embed_tokens.weight", (config.vocab_size, width), same),
        "final_norm/scale": Tensor("model.norm.weight", (width,), ((0,),)),
    }
    if not config.tie_embeddings:
        found["head/kernel"] = Tensor("lm_head.weight", (width, config.vocab_size), swapped)
    theirs = "model.layers.{layer}."

    def vector(path: str, name: str, size: int) -> None:
        found[f"layers/{path}"] = Tensor(theirs + name, (size,), ((0,),))

    vector("attention_norm/scale", "input_layernorm.weight", width)
    if config.post_norms:
        vector("attention_post_norm/scale", "post_attention_layernorm.weight", width)
        vector("mlp_norm/scale", "pre_feedforward_layernorm.weight", width)
        vector("mlp_post_norm/scale", "post_feedforward_layernorm.weight", width)
    else:
        vector("mlp_norm/scale", "post_attention_layernorm.weight", width)
    for projection, number in (
        ("query", config.num_heads), ("key", config.num_kv_heads), ("value", config.num_kv_heads)
    ):  # fmt: skip
        path, name = f"layers/attention/{projection}", f"{theirs}self_attn.{projection[0]}_proj"
        shape = (width, number, head)
        found[f"{path}/kernel"] = Tensor(f"{name}.weight", shape, ((1, 2), (0,)))
        if config.qkv_bias:
            found[f"{path}/bias"] = Tensor(f"{name}.bias", (number, head), ((0, 1),))
    name = f"{theirs}self_attn.o_proj"
    shape = (config.num_heads, head, width)
    found["layers/attention/output/kernel"] = Tensor(f"{name}.weight", shape, ((2,), (0, 1)))
    if config.output_bias:
        vector("attention/output/bias", "self_attn.o_proj.bias", width)
    if config.qk_norm:
        vector("attention/query_norm/scale", "self_attn.q_norm.weight", head)
        vector("attention/key_norm/scale", "self_attn.k_norm.weight", head)
    for projection, shape in (
        ("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))
    ):  # fmt: skip
        path, name = f"mlp/{projection}", f"mlp.{projection}_proj"
        found[f"layers/{path}/kernel"] = Tensor(f"{theirs}{name}.weight", shape, swapped)
        if config.mlp_bias:
            vector(f"{path}/bias", f"{name}.bias", shape[1])
    return found
