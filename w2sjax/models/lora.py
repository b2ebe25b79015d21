"""Low-rank adapters: apart from the base, folded into it, and in PEFT's format."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from w2sjax.models.config import PROJECTIONS, ModelConfig
from w2sjax.models.families import Tensor, tensors

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def without_adapters(config: ModelConfig) -> ModelConfig:
    """The config of the base alone, whose parameters are `params["base"]`: for a reference policy
    that costs nothing, since the base is frozen.
    """
    return dataclasses.replace(config, lora=None)


def merge_lora(config: ModelConfig, params: chex.ArrayTree) -> tuple[ModelConfig, chex.ArrayTree]:
    """Folds adapters into their projections: W + (α / rank)·A·B.

    Args:
      config: of a model with adapters.
      params: {"base": …, "lora": …}; not changed.

    Returns:
      The plain model: its config, and parameters of the base's dtypes and shardings, the arrays
      that no adapter touches shared with `params`.

    Raises:
      ValueError: the model has no adapters.
    """
    lora = _lora_of(config)

    def fold(base: Any, adapters: Any) -> Any:
        if "lora_a" in adapters:
            kernel = _folded(base["kernel"], adapters["lora_a"], adapters["lora_b"], lora.scale)
            return {**base, "kernel": kernel}
        return {
            name: fold(child, adapters[name]) if name in adapters else child
            for name, child in base.items()
        }

    return without_adapters(config), fold(params["base"], params["lora"])


def _folded(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """kernel [N, *inputs, *outputs], a [N, *inputs, r], b [N, r, *outputs]."""

    def fold(kernel, a, b):
        layers, rank = a.shape[0], a.shape[-1]
        change = jnp.matmul(a.reshape(layers, -1, rank), b.reshape(layers, rank, -1))
        wide = kernel.astype(jnp.float32) + scale * change.reshape(kernel.shape)
        return wide.astype(kernel.dtype)

    sharding = getattr(kernel, "sharding", None)
    return jax.jit(fold, out_shardings=sharding)(kernel, a, b)


def save_peft(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: chex.ArrayTree,
    *,
    base: str,
    overwrite: bool = False,
) -> None:
    """Writes the adapters alone, as a directory that Hugging Face's `peft` loads.

    Args:
      path: the directory, which must not exist.
      config: of a model with adapters.
      params: {"base": …, "lora": …}, or the adapters alone.
      base: path or name of the checkpoint that they belong to.
      overwrite: replace what is there.

    Raises:
      FileExistsError: the directory exists.
      ValueError: the model has no adapters.
    """
    lora, path = _lora_of(config), Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another, or overwrite=True")
    adapters = params.get("lora", params)
    arrays = {}
    for site, tensor in _adapted(config).items():
        room, projection = site.split("/")
        a, b = (
            np.asarray(adapters["layers"][room][projection][name]) for name in ("lora_a", "lora_b")
        )
        for layer in range(config.num_layers):
            name = _peft_name(tensor, layer)
            arrays[f"{name}.lora_A.weight"] = np.ascontiguousarray(
                a[layer].reshape(-1, lora.rank).T
            )
            arrays[f"{name}.lora_B.weight"] = np.ascontiguousarray(
                b[layer].reshape(lora.rank, -1).T
            )
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(t.name.split(".")[-2] for t in _adapted(config).values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if jax.process_index() == 0:
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / _CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        save_file(arrays, partial / _WEIGHTS, metadata={"format": "pt"})
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)


def load_peft(path: str | os.PathLike[str], config: ModelConfig) -> chex.ArrayTree:
    """Reads adapters that `save_peft` or `peft` wrote.

    Args:
      path: the directory.
      config: of the model with adapters that they are for; its `lora` must be theirs.

    Returns:
      `params["lora"]`, float32 arrays on the host.

    Raises:
      FileNotFoundError: the directory lacks a file.
      ValueError: rank, scale or tensors are not those of the config; the message names them.
    """
    lora, path = _lora_of(config), Path(path)
    for file in (_CONFIG, _WEIGHTS):
        if not (path / file).is_file():
            raise FileNotFoundError(f"{path / file} does not exist")
    fields = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
    for field, wanted in (("r", lora.rank), ("lora_alpha", lora.alpha)):
        if fields.get(field) != wanted:
            raise ValueError(f"{path / _CONFIG}: {field} is {fields.get(field)}, not {wanted}")
    for field in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if fields.get(field):
            raise ValueError(f"{path / _CONFIG}: {field} is not supported")
    arrays = load_file(path / _WEIGHTS)
    found: dict[str, dict[str, Any]] = {}
    for site, tensor in _adapted(config).items():
        inputs, outputs = _ends(site, tensor)
        parts: dict[str, list[np.ndarray]] = {"lora_a": [], "lora_b": []}
        for layer in range(config.num_layers):
            name = _peft_name(tensor, layer)
            for ours, theirs, shape in (
                ("lora_a", f"{name}.lora_A.weight", (*inputs, lora.rank)),
                ("lora_b", f"{name}.lora_B.weight", (lora.rank, *outputs)),
            ):
                array = arrays.pop(theirs, None)
                size = int(np.prod(shape))
                if array is None or array.size != size:
                    raise ValueError(
                        f"{path / _WEIGHTS}: {theirs} is "
                        + ("missing" if array is None else f"{array.shape}, wanted {shape}")
                    )
                parts[ours].append(array.T.astype(np.float32).reshape(shape))
        room, projection = site.split("/")
        stacked = {name: np.stack(layers) for name, layers in parts.items()}
        found.setdefault(room, {})[projection] = stacked
    if arrays:
        raise ValueError(f"{path / _WEIGHTS}: left over {sorted(arrays)[:5]}")
    return {"layers": found}


def _lora_of(config: ModelConfig) -> Any:
    if config.lora is None:
        raise ValueError("ModelConfig.lora is None: this model has no adapters")
    return config.lora


def _adapted(config: ModelConfig) -> dict[str, Tensor]:
    """Site of every adapter → its kernel's tensor."""
    kernels = tensors(config)
    return {
        site: kernels[f"layers/{site}/kernel"] for site in PROJECTIONS if config.lora.adapts(site)
    }


def _peft_name(tensor: Tensor, layer: int) -> str:
    name = tensor.name.format(layer=layer).removesuffix(".weight")
    return f"base_model.model.{name}"


def _ends(site: str, tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a projection's inputs and outputs."""
    split = 2 if site == "attention/output" else 1
    return tensor.shape[:split], tensor.shape[split:]
