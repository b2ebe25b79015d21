"""One update: jitted, sharded, blind to the model's insides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from w2sjax.losses import LossFn, Mean, ScoreFn
from w2sjax.parallel import across_processes, replicated
from w2sjax.train.state import TrainState, check_rows, default_mesh, row_sharding
from w2sjax.types import PackedBatch

Metrics = dict[str, chex.Array]  # float32 [] each


class TrainStep:
    """`step(state, batch, extras, frozen) → (state, metrics)`; the state is consumed (its buffers
    are donated).

    Shardings are taken from the first state it sees and kept. Pure: one object serves any number of
    runs, and compiles once per shape.
    """

    def __init__(
        self,
        score_fn: ScoreFn,
        loss_fn: LossFn,
        tx: optax.GradientTransformation,
        *,
        mesh: Mesh | None = None,
        accumulate: int = 1,
        dropout_seed: int | None = None,
    ):
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1; got {accumulate}.")
        self._score_fn = score_fn
        self._loss_fn = loss_fn
        self._tx = tx
        self._mesh = mesh if mesh is not None else default_mesh()
        self._accumulate = accumulate
        self._dropout_seed = dropout_seed
        self._jitted: Callable[..., tuple[TrainState, Metrics]] | None = None

    def __call__(
        self,
        state: TrainState,
        batch: PackedBatch,
        extras: Mapping[str, chex.Array] | None = None,
        frozen: Mapping[str, Any] | None = None,
    ) -> tuple[TrainState, Metrics]:
        """Makes one update.

        Args:
          state: from `init_state`; not to be used afterwards.
          batch: arrays [S, L], or [K, S, L] with accumulate = K > 1. S must divide over the mesh's
            batch axes.
          extras: arrays [P], or [K, P], that the loss reads.
          frozen: parameters that are not trained, such as {"base": …} beside a state of {"lora":
            …}: the model gets both dicts as one. No gradient of them is computed.

        Returns:
          The next state, and metrics: `loss`, `grad_norm` (before clipping), `learning_rate` (where
            the optimizer tells), and the loss's own.

        Raises:
          ValueError: where the batch's shape does not go with `accumulate` or the mesh.
        """
        jitted, batch, extras = self._prepared(state, batch, extras)
        with jax.set_mesh(self._mesh):  # for the activations that the model constrains
            return jitted(state, batch, extras, frozen)

    def lower(self, state: Any, batch: Any, extras: Any = None, frozen: Any = None) -> Any:
        """The update before it is compiled, for arguments as in a call or their
        `jax.ShapeDtypeStruct` with shardings: `.compile()` tells its code and its memory.
        """
        jitted, batch, extras = self._prepared(state, batch, extras)
        with jax.set_mesh(self._mesh):
            return jitted.lower(state, batch, extras, frozen)

    def _prepared(self, state: Any, batch: Any, extras: Any) -> tuple[Any, Any, Any]:
        """The jitted update, and its arguments as several processes pass them."""
        self._check(batch)
        rows = row_sharding(self._mesh, stacked=self._accumulate > 1)
        everywhere = replicated(self._mesh)
        batch = across_processes(batch, rows)
        extras = across_processes(dict(extras or {}), everywhere)
        if self._jitted is None:
            state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
            self._jitted = jax.jit(
                self._update,
                in_shardings=(state_shardings, rows, everywhere, None),  # frozen ones stay put
                out_shardings=(state_shardings, everywhere),
                donate_argnums=0,
            )
        return self._jitted, batch, extras

    def _check(self, batch: PackedBatch) -> None:
        shape = batch.tokens.shape
        if self._accumulate == 1:
            wanted, fits = "[S, L] (accumulate = 1)", len(shape) == 2
        else:
            wanted = f"[{self._accumulate}, S, L] (accumulate = {self._accumulate})"
            fits = len(shape) == 3 and shape[0] == self._accumulate
        if not fits:
            raise ValueError(
                f"the batch's tokens must be {wanted}; got {list(shape)}. "
                "Give the loader micro_batches = accumulate."
            )
        check_rows(shape[-2], self._mesh)

    def _update(
        self, state: TrainState, batch: PackedBatch, extras, frozen
    ) -> tuple[TrainState, Metrics]:
        grads, sums = self._gradients(state, batch, extras, frozen)
        loss_sum, denominator, loss_metrics = sums
        grads = jax.tree.map(lambda grad: (grad / denominator).astype(grad.dtype), grads)
        metrics = {
            name: value.total / value.weight if isinstance(value, Mean) else value.total
            for name, value in loss_metrics.items()
        }
        metrics["loss"] = loss_sum / denominator
        metrics["grad_norm"] = optax.tree_utils.tree_norm(grads)
        grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, state.params)
        updates, opt_state = self._tx.update(grads, state.opt_state, state.params)
        rate = _learning_rate(opt_state)
        if rate is not None:
            metrics["learning_rate"] = rate
        params = optax.apply_updates(state.params, updates)
        return TrainState(params=params, opt_state=opt_state, step=state.step + 1), metrics

    def _gradients(self, state: TrainState, batch: PackedBatch, extras, frozen):
        """Gradient of the loss sum (float32 at least) and the sums, over all micro-batches."""

        def summed(params, batch, extras, micro):
            options = {}
            if self._dropout_seed is not None:
                key = jax.random.fold_in(jax.random.key(self._dropout_seed), state.step)
                options["dropout_key"] = jax.random.fold_in(key, micro)
            whole = params if frozen is None else {**frozen, **params}
            logps = self._score_fn(whole, batch, **options)
            output = self._loss_fn(logps, batch, extras)
            return output.loss_sum, tuple(output)

        def one(batch, extras, micro):
            grads, sums = jax.grad(summed, has_aux=True)(state.params, batch, extras, micro)
            wide = jax.tree.map(
                lambda grad: grad.astype(jnp.promote_types(grad.dtype, jnp.float32)), grads
            )
            return wide, sums

        if self._accumulate == 1:
            return one(batch, extras, jnp.int32(0))
        parts = (batch, extras, jnp.arange(self._accumulate, dtype=jnp.int32))
        first = jax.tree.map(lambda leaf: leaf[0], parts)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, *first)
        )
        total, _ = jax.lax.scan(
            lambda total, part: (jax.tree.map(jnp.add, total, one(*part)), None),
            zeros,
            parts,
        )
        return total


def make_train_step(
    score_fn: ScoreFn,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    accumulate: int = 1,
    dropout_seed: int | None = None,
) -> TrainStep:
    """The update of a training run.

    Args:
      score_fn: (params, batch) → per_token_logps [S, L], as in `types.Policy`; it takes a
        `dropout_key` too where there is a `dropout_seed`. `losses.score_from_logits` makes one of
        a model that gives logits.
      loss_fn: (per_token_logps, batch, extras) → `losses.LossOutput`.
      tx: the optimizer.
      mesh: where it runs; rows of a batch are split over its batch axes. By default one device.
      accumulate: K micro-batches per update; gradients are those of the one big batch.
      dropout_seed: for models that drop something in training; what is dropped at an update is a
        function of the seed, the update's number and the micro-batch. None: nothing is.

    Returns:
      A `TrainStep`.
    """
    return TrainStep(
        score_fn, loss_fn, tx, mesh=mesh, accumulate=accumulate, dropout_seed=dropout_seed
    )


def _learning_rate(opt_state) -> chex.Array | None:
    """What `RateState`, or `optax.inject_hyperparams`, noted; None where nothing did."""
    return optax.tree_utils.tree_get(
        opt_state, "learning_rate", filtering=lambda _, value: isinstance(value, jax.Array)
    )
