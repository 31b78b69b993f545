"""Groups of parameters by their paths: a method, a factor of the rate and a decay for each."""

import contextlib
import dataclasses
import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from .._arguments import in_range, injectable, one_of, require_transformation
from ..matrices.axes import LeafAxes
from ..matrices.names import part_of
from ..matrices.rules import resolve_axes
from .decay import Decay, WeightDecay, check_decay, stages
from .fallback import is_recording, record, record_all, recorded, state_bytes
from .skip_nonfinite import Freezable, chain, in_float32, skip_nonfinite

KINDS = ("matrix", "head", "embedding", "other")
FIELDS = ("pattern", "method", "rate", "decay")
FROZEN = "frozen"


@dataclasses.dataclass(frozen=True)
class kind:  # read as a word in a rule, beside patterns
    """All leaves of one kind of `fo.label_params`, in place of a pattern in a rule of `fo.groups`.

    Args:
      name: "matrix", "head", "embedding" or "other".

    Raises:
      ValueError: for another name.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = fo.groups(0.02, [(fo.kind("matrix"), fo.scale_by_muon()), (".*", optax.scale_by_adam(), 0.1)])
    """

    name: str

    def __post_init__(self) -> None:
        """Refuse what no leaf is."""
        one_of("kind", self.name, KINDS)

    def __str__(self) -> str:
        return f"kind {self.name}"


class Rule(NamedTuple):
    """A rule of `groups`, checked."""

    pattern: str | kind
    method: optax.GradientTransformation | None
    rate: float = 1.0
    decay: WeightDecay = 0.0

    def fits(self, leaf: LeafAxes) -> bool:
        """Whether the leaf is one that the rule speaks of."""
        if isinstance(self.pattern, kind):
            return leaf.kind == self.pattern.name
        return re.search(self.pattern, leaf.path) is not None

    @property
    def label(self) -> str:
        """The group's name in the state."""
        return str(self.pattern)


@injectable
def groups(
    learning_rate: optax.ScalarOrSchedule,
    rules: Sequence[Sequence[Any] | Mapping[str, Any]],
    *,
    axes: PyTree = None,
    allow_unused: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer of several methods, one for each group of parameters: `optax.partition` by the paths of leaves.

    A rule is ``(pattern, method, rate, decay)``, or a dictionary of these. A leaf goes to the first rule that fits.
    Its step is ``W ← W - lr rate (u + decay W)``, with the direction u of ``method``. All groups skip a step together
    whose gradient is not finite. What a leaf is, is read off the whole tree before it is split.

    Args:
      learning_rate: number or schedule, for all groups.
      rules: in order.
        ``pattern``: a regular expression, searched for anywhere in a path such as "Block_0/attn/query/kernel", or an
        `fo.kind`.
        ``method``: a direction, such as ``fo.scale_by_muon()``; None freezes the leaves, and keeps no state of them. An
        optimizer with a rate of its own, such as ``fo.muon(0.02)``, would go uphill.
        ``rate``: the factor of the learning rate, above 0; 1 if it is left out.
        ``decay``: a number, a schedule or an `fo.Decay`; 0 if it is left out. A number is per unit of the group's own
        rate; the peak of an `fo.Decay` is one of ``learning_rate``, whatever the factor.
      axes: as in `muon`, for all methods that have none of their own. A function, theirs too, gets the whole tree.
      allow_unused: whether a rule may be without a leaf.

    Raises:
      ValueError: at construction, for a pattern that comes twice or is no regular expression, and for numbers out of
        range; in `init`, for a leaf without a rule or a rule without a leaf.
      TypeError: for what is neither a rule nor a transformation.

    Example:
      >>> import optax, fisher_optax as fo
      >>> tx = fo.groups(optax.cosine_decay_schedule(3e-3, 1000), [
      ...     (r"embed|lm_head", optax.scale_by_adam(), 0.3),
      ...     (r"attn|mlp", fo.scale_by_muon(scale="shape"), 5.0, 0.1),
      ...     (r"encoder/", None),
      ...     (r".*", optax.scale_by_adam())])
    """
    checked = _checked(learning_rate, rules)
    transforms: dict[Hashable, optax.GradientTransformation] = {
        rule.label: _group(learning_rate, rule) for rule in checked
    }

    def split(tree: PyTree) -> tuple[list[LeafAxes], list[int], optax.GradientTransformationExtraArgs]:
        leaves = resolve_axes(tree, axes, jnp.inexact)
        owners = _owners(checked, leaves, allow_unused)
        labelled = jax.tree.structure(tree).unflatten([checked[i].label for i in owners])
        return leaves, owners, optax.partition(transforms, lambda _: labelled)

    def init(params: PyTree) -> PyTree:
        with part_of(params, axes):
            leaves, owners, tx = split(params)
            with recorded() if is_recording() else contextlib.nullcontext() as rows:
                state = tx.init(params)
            if rows is not None:
                _record(rows, checked, leaves, owners, params)
            return state

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> tuple[PyTree, PyTree]:
        tree = updates if params is None else params
        with part_of(tree, axes):
            return split(tree)[2].update(updates, state, params, **extra)

    guarded = skip_nonfinite(Freezable(init, update))

    def update_of_trained(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Whatever the gradient of a frozen leaf is, it stops no step."""
        leaves, structure = jax.tree.flatten(updates)
        owners = split(updates if params is None else params)[1]
        trained = [_zero(g) if checked[i].method is None else g for g, i in zip(leaves, owners, strict=True)]
        return guarded.update(structure.unflatten(trained), state, params, **extra)

    frozen = any(rule.method is None for rule in checked)
    return optax.GradientTransformationExtraArgs(guarded.init, update_of_trained) if frozen else guarded


def _zero(g: Any) -> Any:
    return jnp.zeros_like(g) if jnp.issubdtype(jnp.result_type(g), jnp.inexact) else g


def _checked(learning_rate: optax.ScalarOrSchedule, rules: Sequence[Any]) -> list[Rule]:
    """The rules, or an error that names the first that is none."""
    in_range("learning_rate", learning_rate, 0)
    checked: list[Rule] = []
    for i, given in enumerate(rules):
        rule = _rule(i, given)
        if rule.label in {other.label for other in checked}:
            raise ValueError(f"rule {i}: {rule.label!r} comes twice, and the first match wins: leave one of them out.")
        if rule.method is not None:
            check_decay(learning_rate, rule.decay)
        checked.append(rule)
    if not checked:
        raise ValueError("groups got no rules; give at least one, such as (r'.*', optax.scale_by_adam()).")
    return checked


def _rule(i: int, given: Any) -> Rule:
    wanted = "wanted (pattern, method), with a factor of the rate and a decay after them if any, or a dict of these"
    if isinstance(given, Mapping):
        if unknown := given.keys() - set(FIELDS):
            raise TypeError(f"rule {i} has {sorted(unknown)}; its keys may be {', '.join(FIELDS)}.")
        if not {"pattern", "method"} <= given.keys():
            raise TypeError(f"rule {i} is {given!r}; {wanted}.")
        rule = Rule(**given)
    elif isinstance(given, tuple | list) and 2 <= len(given) <= 4 and not hasattr(given, "init"):
        rule = Rule(*given)
    else:
        raise TypeError(f"rule {i} is {given!r}; {wanted}.")
    if not isinstance(rule.pattern, str | kind):
        raise TypeError(f"rule {i}: the pattern is {rule.pattern!r}; wanted a regular expression or an fo.kind.")
    if isinstance(rule.pattern, str):
        try:
            re.compile(rule.pattern)
        except re.error as error:
            raise ValueError(f"rule {i}: {rule.pattern!r} is no regular expression: {error}.") from None
    if rule.method is not None:
        require_transformation(f"rule {i} ({rule.label!r}): method", rule.method)
        in_range(f"rule {i} ({rule.label!r}): rate", rule.rate, 0)
        if rule.rate == 0:
            raise ValueError(f"rule {i} ({rule.label!r}): rate is 0; None in the place of the method freezes leaves.")
    return rule


def _group(learning_rate: optax.ScalarOrSchedule, rule: Rule) -> optax.GradientTransformation:
    """The method of a group with its rate and its decay."""
    if rule.method is None:
        return optax.set_to_zero()
    return chain(in_float32(rule.method), *stages(_times(rule.rate, learning_rate), _decay(rule), None))


def _times(factor: float, learning_rate: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
    if factor == 1:
        return learning_rate
    if callable(learning_rate):
        schedule = learning_rate
        return lambda count: factor * schedule(count)
    return factor * learning_rate


def _decay(rule: Rule) -> WeightDecay:
    """The decay, whose peak goes with the group's rate: that divided by this is the schedule's share, as ever."""
    decay = rule.decay
    if not isinstance(decay, Decay) or decay.peak_learning_rate is None:
        return decay
    return dataclasses.replace(decay, peak_learning_rate=rule.rate * decay.peak_learning_rate)


def _owners(rules: list[Rule], leaves: list[LeafAxes], allow_unused: bool) -> list[int]:
    """The number of each leaf's rule."""
    fits = [[i for i, rule in enumerate(rules) if rule.fits(leaf)] for leaf in leaves]
    lost = [leaf.path for leaf, found in zip(leaves, fits, strict=True) if not found]
    if lost:
        near = difflib.get_close_matches(lost[0], [rule.label for rule in rules], n=2, cutoff=0)
        raise ValueError(
            f"no rule fits {lost[0]!r} ({len(lost)} of {len(leaves)} leaves are without one); nearest are "
            f"{', '.join(map(repr, near))}. End the rules with (r'.*', method), where"
            " None in the place of the method freezes the rest."
        )
    owners = [found[0] for found in fits]
    unused = [i for i in range(len(rules)) if i not in owners]
    if unused and leaves and not allow_unused:
        i = unused[0]
        earlier = sorted({found[0] for found in fits if i in found})
        near = difflib.get_close_matches(rules[i].label, [leaf.path for leaf in leaves], n=3, cutoff=0)
        why = (
            f"what it fits went to {', '.join(f'rule {k} ({rules[k].label!r})' for k in earlier)}, and the first wins"
            if earlier
            else f"nearest are {', '.join(map(repr, near))}"
        )
        raise ValueError(
            f"rule {i} ({rules[i].label!r}) has no leaf: {why}. Correct or move it, or pass allow_unused=True."
        )
    return owners


def _record(rows: list[Any], rules: list[Rule], leaves: list[LeafAxes], owners: list[int], params: PyTree) -> None:
    """The rows of the methods inside, and one for each leaf that has none, all with their rules."""
    by_path = {leaf.path: owner for leaf, owner in zip(leaves, owners, strict=True)}
    record_all([row._replace(**_cells(by_path[row.path], rules)) if row.path in by_path else row for row in rows])
    written = {row.path for row in rows}
    for place, (leaf, owner) in enumerate(zip(leaves, owners, strict=True)):
        if leaf.path not in written:
            method = rules[owner].method
            size = 0 if method is None else state_bytes(method, params, (place,))
            name = FROZEN if method is None else getattr(method.init, "__qualname__", "-").split(".")[0]
            record(leaf, state_bytes=size, method=name, axes=None, **_cells(owner, rules))


def _cells(owner: int, rules: list[Rule]) -> dict[str, Any]:
    rule = rules[owner]
    if rule.method is None:
        return {"rule": owner, "pattern": rule.label}
    return {"rule": owner, "pattern": rule.label, "rate": rule.rate, "decay": _told(rule.decay)}


def _told(decay: WeightDecay) -> str:
    """A decay in words."""
    number, mode = (decay.weight_decay, f" {decay.mode}") if isinstance(decay, Decay) else (decay, "")
    return ("schedule" if callable(number) else f"{number:g}" if isinstance(number, int | float) else "array") + mode
