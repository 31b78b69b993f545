"""The rows of a Fisher, by layers and a few examples at a time: what every approximation is a sum of.

With R of (r, D), ``RᵀR = F``, row r has one matrix G_r of m x n for each layer: its kernel, with the bias as last row.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..._arguments import hashable
from ..._xla import of_each
from ...capture.kinds.sums import check_counts
from ...capture.losses import total
from ...capture.outputs import Output, outputs
from ...capture.report import infer_axes
from ...matrices.axes import path_names
from ...matrices.floats import on_whole, without_rest
from ...matrices.layout import Layer
from .layer_forms import Entries, RowSum, einsum, matrices_of
from .matrix import FISHERS, operator


@dataclasses.dataclass(frozen=True)
class Source:
    """Which Fisher, in the arguments of `operator`, and of how many examples at once (None: of all)."""

    loss_fn: Callable[..., PyTree]
    fisher: str
    n_samples: int
    temperature: float
    batch_size: int | None


class LayerRows(NamedTuple):
    """All rows, made anew in every pass over them."""

    source: Source
    layers: tuple[Layer, ...]
    params: PyTree
    batch: tuple[PyTree, ...]
    key: PRNGKeyArray | None

    @property
    def number(self) -> int:
        """r, how many there are."""
        return sum(math.prod(o.weights.shape) * self.labels(o) for o in self._outputs())

    def require_one_loss(self) -> None:
        """A ValueError where a few examples' shares differ between losses."""
        if len(self._outputs()) > 1:
            raise ValueError(
                f"loss_fn calls fo.losses {len(self._outputs())} times, and the factors of K-FAC are sums over all of "
                "them: with batch_size=None all examples are seen together."
            )

    def _outputs(self) -> list[Output]:
        return jax.eval_shape(lambda: outputs(self.source.loss_fn, self.params, *self.batch)[0])

    def labels(self, out: Output) -> int:
        """How many rows a position has."""
        return {"true": out.logits.shape[-1], "mc": self.source.n_samples, "empirical": 1}[self.source.fisher]

    def fold(self, step: Callable[[PyTree, Array], tuple[PyTree, PyTree]], start: PyTree) -> tuple[PyTree, PyTree]:
        """``carry, out = step(carry, R)`` over the rows, some at a time: the last carry, and the outs of all."""
        if self.source.batch_size is None:
            return step(start, self._of(self.batch, self.key, None))

        def rows_of_example(number: Array, example: PyTree, shares: list[Array]) -> Array:
            return self._of(jax.tree.map(lambda x: x[None], example), self.key_of(number), shares)

        def on_chunk(carry: PyTree, numbers: Array, examples: PyTree, shares: list[Array]) -> tuple[PyTree, PyTree]:
            R = of_each(rows_of_example, numbers, examples, shares)
            return step(carry, R.reshape(-1, R.shape[-1]))

        return self.over_chunks(on_chunk, start)

    def key_of(self, number: Array) -> PRNGKeyArray | None:
        """For the labels of one example, or of a chunk from it on."""
        return None if self.key is None else jax.random.fold_in(self.key, number)

    def over_chunks(self, on_chunk: Callable[..., tuple[PyTree, PyTree]], start: PyTree) -> tuple[PyTree, PyTree]:
        """``carry, out = on_chunk(carry, numbers, examples, shares)``, ``batch_size`` examples at a time."""
        assert self.source.batch_size is not None
        each = (jnp.arange(E := len(jax.tree.leaves(self.batch)[0])), self.batch, self._shares())
        size = min(E, self.source.batch_size)
        whole = E // size
        carry, out = jax.lax.scan(
            lambda carry, chunk: on_chunk(carry, *chunk),
            start,
            jax.tree.map(lambda x: x[: whole * size].reshape(whole, size, *x.shape[1:]), each),
        )
        out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
        if E % size:
            carry, rest = on_chunk(carry, *jax.tree.map(lambda x: x[whole * size :], each))
            out = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, rest)
        return carry, out

    def _shares(self) -> list[Float[Array, " E"]]:
        """Of each example in the mean, for each loss, in units of what it is in the mean of itself alone."""

        def of_example(example: PyTree) -> list[tuple[Array, Array]]:
            found = outputs(self.source.loss_fn, self.params, *jax.tree.map(lambda x: x[None], example))[0]
            return [(jnp.sum(o.weights), jnp.sum(o.factor)) for o in found]

        whole = outputs(self.source.loss_fn, self.params, *self.batch)[0]
        each = zip(of_each(of_example, self.batch), whole, strict=True)
        return [w / total(w) * jnp.sum(o.factor) / jnp.where(c == 0, 1, c) for (w, c), o in each]

    def _of(self, batch: PyTree, key: PRNGKeyArray | None, shares: list[Array] | None) -> Float[Array, "r d"]:
        """Position by position, and of each label by label; of a batch with these shares in the whole."""
        s = self.source
        F = operator(
            s.loss_fn, self.params, *batch, fisher=s.fisher, n_samples=s.n_samples, temperature=s.temperature, key=key
        )
        R, made, start = F.rows(), [], 0
        R = R.astype(jnp.promote_types(R.dtype, jnp.float32))
        for i, out in enumerate(outputs(s.loss_fn, self.params, *batch)[0]):
            K, P = self.labels(out), math.prod(out.weights.shape)
            rows = jnp.swapaxes(R[start : start + K * P].reshape(K, P, -1), 0, 1).reshape(K * P, -1)
            made.append(rows if shares is None else rows * jnp.sqrt(shares[i]).astype(R.dtype))
            start += K * P
        return jnp.concatenate(made)

    # --- as matrices

    def matrices(self, R: Float[Array, "r d"]) -> list[Float[Array, "r N m n"]]:
        """Of each layer, then of each other leaf as a column."""
        leaves, start = [], 0
        for x in jax.tree.leaves(self.params):
            n = math.prod(jnp.shape(x))
            leaves.append(R[:, start : start + n].reshape(-1, *jnp.shape(x)))
            start += n
        return jax.vmap(lambda leaves: matrices_of(self.layers, leaves))(leaves)

    def sum(self, f: Callable[..., PyTree], *statistics: list[PyTree]) -> list[PyTree]:
        """Of each layer, ``Σ f(G, ...)`` with G some of its matrices and these statistics of it."""

        def of(R: Array) -> list[PyTree]:
            G = self.matrices(R)[: len(self.layers)]
            return [f(*xs) for xs in zip(G, *statistics, strict=True)]

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of, self.shape))
        return self.fold(lambda sums, R: (jax.tree.map(jnp.add, sums, of(R)), ()), zero)[0]

    def exact(self, layers: bool = True) -> list[RowSum | Entries]:
        """The blocks of the layers, or those of all other leaves: by rows or by entries, as there are fewer."""
        cut = slice(0, len(self.layers)) if layers else slice(len(self.layers), None)
        shapes = [x.shape[1:] for x in jax.eval_shape(self.matrices, self.shape)[cut]]
        if not shapes:
            return []
        by_rows = [self.number < math.prod(shape[1:]) for shape in shapes]
        dtype = self.shape.dtype

        def step(sums: list[Array], R: Array) -> tuple[list[Array], list[Array | tuple[()]]]:
            G = self.matrices(R)[cut]
            new = [s if b else s + einsum("raij,rakl->aijkl", g, g) for s, g, b in zip(sums, G, by_rows, strict=True)]
            return new, [g if b else () for g, b in zip(G, by_rows, strict=True)]

        start = [jnp.zeros(() if b else (*s, *s[1:]), dtype) for s, b in zip(shapes, by_rows, strict=True)]
        sums, stored = self.fold(step, start)
        made = zip(sums, stored, by_rows, strict=True)
        return [RowSum(jnp.swapaxes(G, 0, 1)) if b else Entries(s) for s, G, b in made]

    @property
    def shape(self) -> jax.ShapeDtypeStruct:
        """Of one row."""
        leaves = jax.tree.leaves(self.params)
        size, dtype = sum(x.size for x in leaves), jnp.result_type(jnp.float32, *leaves)
        return jax.ShapeDtypeStruct((1, size), dtype)


def dense(
    loss_fn: Callable[..., PyTree],
    params: PyTree,
    *batch: PyTree,
    fisher: str = "true",
    n_samples: int = 1,
    temperature: float = 1.0,
    key: PRNGKeyArray | None = None,
    batch_size: int | None = 16,
) -> Float[Array, "d d"]:
    """All entries of a model's Fisher, ``operator(...).dense()``, a few examples at a time: for small models.

    Args:
      loss_fn, params, *batch, fisher, n_samples, temperature, key: as in `operator`, with ``fisher`` "true", "mc" or
        "empirical".
      batch_size: how many examples are differentiated at once, each as a batch of one. It changes neither the result
        nor the labels that are drawn, memory alone: 16 x rows of an example x D numbers by default. It needs a loss
        that is the (weighted) mean of losses of single examples, which are the leading axis of every leaf of
        ``batch``: no batch normalisation in training mode, no constants among the arguments. None: all together, for
        any loss.

    Raises:
      ValueError, TypeError: as `operator`; for leading axes that differ, and a loss whose positions they do not count.

    Example:
      >>> import jax.numpy as jnp, fisher_optax as fo
      >>> loss = lambda W, x, y: fo.losses.softmax_cross_entropy(x @ W, y)
      >>> print(dense(loss, jnp.zeros((1, 2)), jnp.ones((4, 1)), jnp.array([0, 1, 1, 1])).round(3))
      [[ 0.25 -0.25]
       [-0.25  0.25]]
    """
    rows = rows_of(loss_fn, params, batch, fisher, n_samples, temperature, key, batch_size)
    return _dense(rows.source, rows.params, rows.batch, rows.key)


@functools.partial(jax.jit, static_argnums=0)
def _dense(source: Source, params: PyTree, batch: PyTree, key: PRNGKeyArray | None) -> Array:
    rows = LayerRows(source, (), params, batch, key)
    zero = jnp.zeros((rows.shape.shape[1],) * 2, rows.shape.dtype)
    return rows.fold(lambda F, R: (F + einsum("ri,rj->ij", R, R), ()), zero)[0]


def rows_of(
    loss_fn: Callable[..., PyTree],
    params: PyTree,
    batch: PyTree,
    fisher: str,
    n_samples: int,
    temperature: float,
    key: PRNGKeyArray | None,
    batch_size: int | None,
) -> LayerRows:
    """Checked; without layers."""
    if fisher not in FISHERS:
        raise ValueError(f"rows are those of {', '.join(map(repr, FISHERS))}; got fisher={fisher!r}.")
    floats, whole = without_rest(params)
    loss_fn, params = hashable(on_whole(loss_fn, params, whole)), floats
    operator(loss_fn, params, *batch, fisher=fisher, n_samples=n_samples, temperature=temperature, key=key)
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    check_counts("fisher", batch_size=batch_size)
    if batch_size is not None:
        _check_examples(loss_fn, params, batch)
    return LayerRows(Source(loss_fn, fisher, n_samples, float(temperature), batch_size), (), params, batch, key)


def _check_examples(loss_fn: Callable[..., PyTree], params: PyTree, batch: PyTree) -> None:
    """A ValueError unless the leading axis of every leaf counts examples, each with its share of the positions."""
    advice = "With batch_size=None all are seen together."
    shapes = [x.shape for x in jax.tree.leaves(batch)]
    if not shapes or len({shape[:1] for shape in shapes}) > 1 or not shapes[0]:
        raise ValueError(
            "batch_size cuts the batch along the leading axis of its leaves, which has to be one of examples, of one "
            f"length in all; got shapes {shapes}. {advice}"
        )
    E = shapes[0][0]
    positions = lambda batch: jax.eval_shape(  # noqa: E731
        lambda params, batch: [jnp.ravel(o.weights) for o in outputs(loss_fn, params, *batch)[0]], params, batch
    )
    whole, single = positions(batch), positions(jax.tree.map(lambda x: x[:1], batch))
    for all_of, of_one in zip(whole, single, strict=True):
        if all_of.size != E * of_one.size:
            raise ValueError(
                f"batch_size needs a loss that is a mean over examples; of {E} it has {all_of.size} positions, of one "
                f"{of_one.size}. {advice}"
            )


def layers_in(loss_fn: Callable[..., PyTree], params: PyTree, batch: PyTree) -> tuple[Layer, ...]:
    """The matrices that `fo.infer_axes` finds, with their biases."""
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    paths = ["/".join(path_names(path)) for path, _ in flat]
    axes = structure.flatten_up_to(infer_axes(loss_fn, params, *batch))
    return tuple(
        Layer(path, i, None if a.bias is None else paths.index(a.bias), a, jnp.shape(leaf))
        for i, ((_, leaf), path, a) in enumerate(zip(flat, paths, axes, strict=True))
        if a is not None
    )
