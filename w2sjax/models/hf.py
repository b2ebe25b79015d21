"""Checkpoints in Hugging Face's format, in and out: a directory with config.json and safetensors.

Tensors are streamed. Reading goes piece by piece from the file to the shards that live on this
host's devices; writing takes them off in pieces, straight to the file. Nothing but
safetensors is read.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open

from w2sjax.models.config import ModelConfig
from w2sjax.models.families import Tensor, from_hf, tensors, to_hf
from w2sjax.models.policy import abstract_params, init_params
from w2sjax.models.transformer import PARTITION_RULES
from w2sjax.parallel import Rules, make_mesh, param_shardings, path_name

_CONFIG, _INDEX, _SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_PIECE_BYTES = 2**22  # tensors are read and written in pieces of about this size
_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Tensors that may be there and say nothing new.
_IGNORED_ENDINGS = ("rotary_emb.inv_freq",)


def read_config(path: str | os.PathLike[str], **changes: Any) -> ModelConfig:
    """The model that a checkpoint directory holds; no weights are read.

    Args:
      path: directory with a `config.json`.
      **changes: fields of `ModelConfig` to set beside, such as `param_dtype`, `remat`, `lora`.

    Returns:
      The config.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read, or asks for what this model cannot do.
    """
    import transformers  # takes seconds

    file = Path(path) / _CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; a checkpoint is a directory with one")
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
        if kind not in transformers.CONFIG_MAPPING:
            raise ValueError(f"model_type is {kind!r}, which transformers does not know")
        fields = transformers.CONFIG_MAPPING[kind].from_pretrained(str(path)).to_dict()
        return from_hf(fields, **changes)
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise ValueError(f"{file}: {error}") from error


def load_hf(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    rules: Rules = PARTITION_RULES,
    key: chex.PRNGKey | None = None,
    **changes: Any,
) -> tuple[ModelConfig, chex.ArrayTree]:
    """Reads a checkpoint directory; every parameter goes straight to its shards.

    Host memory: what this host's shards need, and one piece of a tensor.

    Args:
      path: directory with `config.json` and safetensors, in one file or several with an index.
      mesh: where the parameters live; one device by default.
      rules: how they are split (`w2sjax.parallel`).
      key: draws the adapters' first values, where `lora` is among the changes; key(0) where None.
      **changes: fields of `ModelConfig` to set beside; `param_dtype` is what is kept ("float32" by
        default, whatever the file has).

    Returns:
      (config, params), params as in `init_params`.

    Raises:
      FileNotFoundError: the directory lacks a file; the message names it.
      ValueError: an unknown architecture; tensors that are missing, left over, or of another shape,
        each by name.
    """
    path = Path(path)
    config = read_config(path, **changes)
    mesh = make_mesh(1, devices=jax.devices()[:1]) if mesh is None else mesh
    abstract = abstract_params(config)
    shardings = param_shardings(abstract, rules, mesh)
    base, base_shardings = abstract, shardings
    if config.lora is not None:
        base, base_shardings = abstract["base"], shardings["base"]
    expected = tensors(config)
    with _Files(path) as files:
        _check_names(path, files, config, expected)

        def read(tree_path: Sequence[Any], leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
            tensor = expected[path_name(tree_path)]
            return _read_sharded(files, tensor, leaf, sharding)

        params = jax.tree.map_with_path(read, base, base_shardings)
    if config.lora is None:
        return config, params
    key = jax.random.key(0) if key is None else key
    draw = jax.jit(lambda key: init_params(config, key)["lora"], out_shardings=shardings["lora"])
    return config, {"base": params, "lora": draw(key)}


class _Files:
    """The tensors of a directory, by name."""

    def __init__(self, path: Path):
        self.path = path
        self._open: dict[str, Any] = {}
        index = path / _INDEX
        if index.is_file():
            try:
                self.file_of = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{index} is no index of tensors: {error!r}") from error
            for name in set(self.file_of.values()):
                if Path(name).name != name or not (path / name).is_file():
                    raise FileNotFoundError(f"{path / name} does not exist; {_INDEX} names it")
        elif (path / _SINGLE).is_file():
            self.file_of = dict.fromkeys(self._handle(_SINGLE).keys(), _SINGLE)
        else:
            raise FileNotFoundError(
                f"{path} has neither {_SINGLE} nor {_INDEX}; other formats are not read. "
                "transformers can convert a checkpoint: save_pretrained(..., safe_serialization)"
            )

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.path / file, framework="np")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.path / file} cannot be read: {error}") from error
        return self._open[file]

    def part(self, name: str) -> Any:
        """A tensor to slice: each slice is read from the file when it is taken."""
        try:
            return self._handle(self.file_of[name]).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{self.path / self.file_of[name]}: {error}") from error


def _names(tensor: Tensor, num_layers: int) -> list[str]:
    if "{layer}" not in tensor.name:
        return [tensor.name]
    return [tensor.name.format(layer=layer) for layer in range(num_layers)]


def _check_names(
    path: Path, files: _Files, config: ModelConfig, expected: Mapping[str, Tensor]
) -> None:
    """Raises ValueError that lists what is missing, left over or of another shape."""
    shapes = {
        name: tensor.their_shape
        for tensor in expected.values()
        for name in _names(tensor, config.num_layers)
    }
    there = {name for name in files.file_of if not name.endswith(_IGNORED_ENDINGS)}
    if config.tie_embeddings:
        there.discard("lm_head.weight")  # the same values again
    problems = [f"missing: {name}" for name in sorted(shapes.keys() - there)]
    problems += [f"left over: {name}" for name in sorted(there - shapes.keys())]
    for name in sorted(shapes.keys() & there):
        try:
            found = tuple(files.part(name).get_shape())
        except ValueError as error:
            problems.append(str(error))
            continue
        if found != shapes[name]:
            problems.append(f"{name}: shape {found}, but config.json makes it {shapes[name]}")
    if problems:
        shown = problems[:20] + [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise ValueError(
            f"{path} does not hold the tensors of a {config.family} model:\n  " + "\n  ".join(shown)
        )


@functools.partial(jax.jit, donate_argnums=0)
def _write_piece(buffer: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, piece, tuple(start))


def _read_sharded(
    files: _Files, tensor: Tensor, leaf: jax.ShapeDtypeStruct, sharding: Any
) -> jax.Array:
    """One parameter, its shards filled piece by piece on the devices where they live."""
    by_index: dict[Any, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        by_index.setdefault(bounds, []).append(device)
    buffers = []
    for bounds, devices in by_index.items():
        shape = tuple(stop - start for start, stop in bounds)
        copies = [jnp.zeros(shape, leaf.dtype, device=device) for device in devices]
        for start, piece in _pieces(files, tensor, bounds, leaf.dtype):
            copies = [
                _write_piece(copy, jax.device_put(piece, device), np.asarray(start, np.int32))
                for copy, device in zip(copies, devices, strict=True)
            ]
        buffers += jax.block_until_ready(copies)
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, buffers)


def _pieces(
    files: _Files, tensor: Tensor, bounds: Sequence[tuple[int, int]], dtype: Any
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Pieces of a shard, and where in it each starts."""
    stacked = "{layer}" in tensor.name
    own = bounds[1:] if stacked else bounds
    axis = tensor.axes[0][0]  # the one that runs slowest in the file
    low, high = own[axis]
    row_bytes = np.prod([stop - start for start, stop in own]) // max(1, high - low) * 4
    step = max(1, int(_PIECE_BYTES // max(1, row_bytes)))
    layers = range(*bounds[0]) if stacked else [None]
    for layer, begin in itertools.product(layers, range(low, high, step)):
        cut = [slice(start, stop) for start, stop in own]
        cut[axis] = slice(begin, min(begin + step, high))
        name = tensor.name if layer is None else tensor.name.format(layer=layer)
        theirs = files.part(name)[tensor.their_slices(cut)]
        piece = tensor.to_ours(theirs, [s.stop - s.start for s in cut])
        piece = np.ascontiguousarray(piece.astype(dtype, copy=False))
        start = [0] * len(own)
        start[axis] = begin - low
        if layer is None:
            yield tuple(start), piece
        else:
            yield (layer - bounds[0][0], *start), piece[None]


def save_hf(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: chex.ArrayTree,
    tokenizer: Any = None,
    *,
    max_file_bytes: int = 4 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint directory that transformers, and what builds on it, loads.

    The directory appears when it is whole. On several hosts all must call this; the first writes.
    Host memory: a few MB; on several hosts, each has one tensor at a time whole on its devices.

    Args:
      path: the directory, which must not exist.
      config: the model's shape; `family` says as what it is written.
      params: its parameters, in the dtype to be written. For adapters see `merge_lora` and
        `save_peft`.
      tokenizer: a Hugging Face tokenizer, written beside; its special tokens go into the config.
      max_file_bytes: a new file is begun before one would be larger.
      overwrite: replace what is there.

    Raises:
      FileExistsError: the directory exists.
      ValueError: adapters, or a shape that the family's config cannot say.
    """
    if config.lora is not None:
        raise ValueError("the model has adapters: merge them first (merge_lora), or use save_peft")
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another, or overwrite=True")
    fields = to_hf(config)
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(params)}
    fields["dtype"] = dtypes.pop() if len(dtypes) == 1 else config.param_dtype
    if tokenizer is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            fields[name] = getattr(tokenizer, name)
    first = jax.process_index() == 0
    partial = path.with_name(path.name + ".partial")
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / _CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    _write_tensors(partial, _their_tensors(config, params), max_file_bytes, write=first)
    if first:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)


class _Outgoing(NamedTuple):
    """A tensor to be written; `layer` says which part of the leaf, where layers are stacked."""

    name: str
    tensor: Tensor
    leaf: chex.Array
    layer: int | None

    @property
    def nbytes(self) -> int:
        return math.prod(self.tensor.shape) * self.leaf.dtype.itemsize

    def pieces(self) -> Iterator[np.ndarray]:
        """The tensor in their layout, row by row of theirs, the same on every host."""
        shards = _shards(self.leaf if self.layer is None else self.leaf[self.layer])
        shape = self.tensor.shape
        axis = self.tensor.axes[0][0]  # the one that runs slowest in the file
        step = max(1, _PIECE_BYTES * shape[axis] // max(1, self.nbytes))
        for start in range(0, shape[axis], step):
            stop = min(start + step, shape[axis])
            ours = np.empty((*shape[:axis], stop - start, *shape[axis + 1 :]), self.leaf.dtype)
            for index, data in shards:
                low, high, _ = index[axis].indices(shape[axis])
                first, last = max(start, low), min(stop, high)
                if first < last:
                    here = slice(first - start, last - start)
                    within = (*index[:axis], here, *index[axis + 1 :])
                    ours[within] = _cut(data, first - low, last - first, axis)
            yield np.ascontiguousarray(self.tensor.to_theirs(ours))


def _their_tensors(config: ModelConfig, params: chex.ArrayTree) -> list[_Outgoing]:
    """All tensors that make up a checkpoint; raises ValueError where params are not the model's."""
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    expected = tensors(config)
    if leaves.keys() != expected.keys():
        missing, more = sorted(expected.keys() - leaves), sorted(leaves.keys() - expected)
        raise ValueError(f"params are not this model's: missing {missing}, left over {more}")
    found = []
    for path, tensor in expected.items():
        stacked = "{layer}" in tensor.name
        shape = (config.num_layers, *tensor.shape) if stacked else tensor.shape
        if leaves[path].shape != shape:
            raise ValueError(f"parameter {path}: shape {leaves[path].shape}, wanted {shape}")
        if leaves[path].dtype.name not in _DTYPES:
            raise ValueError(f"parameter {path}: {leaves[path].dtype} is none of {list(_DTYPES)}")
        for layer, name in enumerate(_names(tensor, config.num_layers)):
            found.append(_Outgoing(name, tensor, leaves[path], layer if stacked else None))
    return found


def _shards(array: chex.Array) -> list[tuple[tuple[slice, ...], chex.Array]]:
    """What makes up an array, with where it lies, none of it on the host's side yet."""
    if not isinstance(array, jax.Array):
        return [((slice(None),) * array.ndim, array)]
    if not array.is_fully_addressable:  # shards lie on several hosts: each gets them all
        array = jax.device_put(array, NamedSharding(array.sharding.mesh, PartitionSpec()))
        return [(shard.index, shard.data) for shard in array.addressable_shards[:1]]
    return [(s.index, s.data) for s in array.addressable_shards if s.replica_id == 0]


def _cut(array: chex.Array, start: int, size: int, axis: int) -> np.ndarray:
    if isinstance(array, jax.Array):
        return np.asarray(_slice(array, start, size=size, axis=axis))
    return array[(*[slice(None)] * axis, slice(start, start + size))]


@functools.partial(jax.jit, static_argnames=("size", "axis"))
def _slice(array: jax.Array, start: chex.Numeric, *, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis)


def _write_tensors(
    directory: Path, outgoing: Sequence[_Outgoing], max_bytes: int, *, write: bool
) -> None:
    """Writes one file, or several with an index."""
    files: list[list[_Outgoing]] = [[]]
    size = 0
    # Wide dtypes first keep every tensor aligned.
    for one in sorted(outgoing, key=lambda one: -one.leaf.dtype.itemsize):
        if files[-1] and size + one.nbytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(one)
        size += one.nbytes
    weight_map = {}
    for number, held in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        file = _SINGLE if len(files) == 1 else file
        weight_map |= dict.fromkeys((one.name for one in held), file)
        _write_file(directory / file if write else Path(os.devnull), held)
    if write and len(files) > 1:
        total = sum(one.nbytes for one in outgoing)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, outgoing: Sequence[_Outgoing]) -> None:
    """Writes safetensors: the header's size (uint64), the header (JSON), then piece by piece."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in outgoing:
        start, end = end, end + one.nbytes
        header[one.name] = {
            "dtype": _DTYPES[one.leaf.dtype.name],
            "shape": one.tensor.their_shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for one in outgoing:
            for piece in one.pieces():
                file.write(piece.reshape(-1).view(np.uint8).data)
