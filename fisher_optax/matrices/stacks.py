"""Which axes of a leaf stack layers, and whether its matrix has its inputs or its outputs first, by its neighbours.

A stack is one axis that all leaves below a module share, the first (``nn.scan``, ``nnx.vmap``) or the second
(``nn.scan(variable_axes={"params": 1})``). It is shown by normalisation vectors of two axes, by biases that repeat it,
or by the module's whole name (`names.STACKS`, `names.EXPERTS`, ``ScanBlock_0``). A router shows experts beside it.
"""

import collections

from .names import (
    ATTENTION_INPUTS,
    ATTENTION_OUTPUTS,
    EINSUMS,
    EXPERTS,
    EXPERTS_IN,
    EXPERTS_OUT,
    LIFTED,
    OUTPUTS_FIRST,
    ROUTERS,
    STACKS,
    VECTORS,
    Leaf,
    bias_name,
)

SMALLEST_RANK = {"kernel": 2, "embedding": 2, "bias": 1, "scale": 1}  # of one layer, unstacked
Module = tuple[str, ...]


class Stacks:
    """What neighbours say, for leaves that are seen together."""

    def __init__(self, leaves: list[Leaf], outputs_first: bool):
        self.all_outputs_first = outputs_first
        self.shapes = {leaf.names: leaf.shape for leaf in leaves}
        self.biases = {name for leaf in leaves if (name := bias_name(leaf)) in self.shapes}
        self.below: dict[Module, list[Leaf]] = collections.defaultdict(list)
        for leaf in leaves:
            for module in leaf.ancestors:
                self.below[module].append(leaf)
        self.orders = self._orders(leaves)
        self.has_weights = any(len(x.shape) > 1 and OUTPUTS_FIRST.fullmatch(x.name) and not x.is_table for x in leaves)
        self.routers = self._routers(leaves)
        self.stacked = {module: self._stacked_axes(module) for module in self.below}
        self.sharing_second = {module for module in self.below if self._shares_second(module)}
        self.along_second = self._outer({module for module in self.sharing_second if self._is_shown(module)})

    def outermost(self, leaf: Leaf) -> tuple[Module | None, Module | None]:
        """The outermost modules around it that are stacked along leading axes, and along the second."""
        first = next((module for module in leaf.ancestors if self.stacked[module]), None)
        return first, next((module for module in leaf.ancestors if module in self.along_second), None)

    def depth(self, leaf: Leaf) -> int:
        """Its leading axes that stack layers, as far as something shows them."""
        fits = self.bias_of(leaf)[1]
        # Otherwise the nearest module that shows a stack decides: no module shows more axes than one inside it.
        return max(fits) if len(fits) == 1 else max(self.stacked[module] for module in leaf.ancestors)

    # Biases, and the order of inputs and outputs.

    def bias_of(self, leaf: Leaf) -> tuple[tuple[int, ...], set[int]]:
        """The bias beside a kernel, and how many stacked axes would leave a bias of one layer's outputs."""
        bias = self.shapes.get(bias_name(leaf), ())
        last = self.is_outputs_first(leaf)
        return bias, set() if last is None else _fits(leaf.shape, bias, last)

    def _orders(self, leaves: list[Leaf]) -> set[bool]:
        """Whether outputs come first, as biases that fit in one order only say of what PyTorch would store so."""
        told = set()
        for leaf in leaves:
            bias = self.shapes.get(bias_name(leaf), ())
            if bias and OUTPUTS_FIRST.fullmatch(leaf.name):
                orders = [first for first in (False, True) if _fits(leaf.shape, bias, first)]
                told |= set(orders) if len(orders) == 1 else set()
        return told

    def is_outputs_first(self, leaf: Leaf) -> bool | None:
        """Whether its outputs come before its inputs; None where nothing decides."""
        if self.is_table(leaf):
            return False
        if self.all_outputs_first or not OUTPUTS_FIRST.fullmatch(leaf.name):
            return self.all_outputs_first or self._order_of_experts(leaf)
        bias = self.shapes.get(bias_name(leaf), ())
        orders = [first for first in (False, True) if bias and _fits(leaf.shape, bias, first)]
        if len(orders) == 1:
            return orders[0]
        if False not in self.orders:
            return True
        return False if bias and True not in self.orders else None

    def _order_of_experts(self, leaf: Leaf) -> bool | None:
        """The same of a leaf that is no ``weight``: inputs first, but for stacks of experts whose sides or whose
        router's tell the width of the model; None where they do not, among weights that have outputs first.
        """
        if leaf.name not in EXPERTS_IN | EXPERTS_OUT or len(leaf.shape) < 3 or bias_name(leaf) in self.shapes:
            return False
        beside = [x for x in self.below[leaf.names[:-1]] if len(x.names) == len(leaf.names) and len(x.shape) > 2]
        ins, outs = ([x.shape[-2:] for x in beside if x.name in names] for names in (EXPERTS_IN, EXPERTS_OUT))
        told = {a[1] == b[0] for a in ins for b in outs if (a[1] == b[0]) != (a[0] == b[1])}
        for width in self._widths(leaf):
            told |= {a[1] == width for a in ins if (a[1] == width) != (a[0] == width)}
            told |= {b[0] == width for b in outs if (b[0] == width) != (b[1] == width)}
        undecided = None if self.has_weights and False not in self.orders else False
        return told.pop() if len(told) == 1 else undecided

    def _widths(self, leaf: Leaf) -> list[int]:
        """Of the model, by the routers of experts: a router has its width and the number of experts."""
        routers = [self.routers[m].shape[-2:] for m in (leaf.names[:-1], leaf.names[:-2]) if m in self.routers]
        return [sum(r) - leaf.shape[-3] for r in routers if r[0] != r[1] and leaf.shape[-3] in r]

    def is_table(self, leaf: Leaf) -> bool:
        """Whether it is looked up: by its name, and without a bias, which a layer of that name would have."""
        return leaf.is_table and bias_name(leaf) not in self.shapes

    # Vectors.

    def is_vector(self, leaf: Leaf) -> bool:
        """Whether one layer's share of the leaf acts as a vector however many axes it has."""
        if leaf.name in ("kernel", "embedding"):
            return False
        elementwise = self.shapes.get(bias_name(leaf), ()) == leaf.shape
        return leaf.name in VECTORS or leaf.names in self.biases or elementwise or leaf.is_normalisation

    def is_vector_by_module(self, leaf: Leaf) -> bool:
        """Whether only its module's name makes it a vector."""
        elementwise = self.shapes.get(bias_name(leaf), ()) == leaf.shape
        return not (leaf.name in VECTORS or leaf.names in self.biases or elementwise)

    # Stacks along leading axes.

    def _stacked_axes(self, module: Module) -> int:
        """The leading axes that stack all of a module: shared by every leaf below, and shown by every witness."""
        witnesses = []
        if all(self.is_vector(leaf) for leaf in self.below[module]):  # which say nothing of themselves
            return 0
        for leaf in self.below[module]:
            if self.is_vector(leaf) and (leaf.name == "scale" or leaf.is_normalisation):
                witnesses.append(len(leaf.shape) - 1)
            fits = self.bias_of(leaf)[1]
            witnesses += fits if len(fits) == 1 else ()
        if not witnesses and self._is_named(module):
            witnesses = [1]
        return max((k for k in range(1, min(witnesses, default=0) + 1) if self._share(module, k)), default=0)

    def _share(self, module: Module, depth: int) -> bool:
        """Whether the first axes are the same for every leaf of the module and leave enough for one layer."""
        shared = self.below[module][0].shape[:depth]
        ranks = ((leaf, len(leaf.shape) - depth) for leaf in self.below[module])
        return all(leaf.shape[:depth] == shared and rank >= SMALLEST_RANK.get(leaf.name, 0) for leaf, rank in ranks)

    def _is_named(self, module: Module) -> bool:
        """Whether a module's name is that of a stack, and its leaves have one axis more than a layer's."""
        name = module[-1] if module else ""
        if name not in STACKS | EXPERTS and not LIFTED.match(name):
            return False
        one_by_one = any(leaf.names[len(module)].isdigit() for leaf in self.below[module])
        ranks = [len(leaf.shape) - (not self.is_vector(leaf)) for leaf in self.below[module]]
        explained = all(_is_axis_explained(leaf, 0) for leaf in self.below[module])
        return not one_by_one and not explained and min(ranks) > 1

    def may_be_stacked(self, leaf: Leaf, depth: int) -> bool:
        """Whether one more stacked axis explains some module as well, and nothing else explains that axis."""
        return self.may_be_along_second(leaf, depth) or any(
            len(self.below[module]) > 1
            and self._share(module, depth + 1)
            and not all(_is_axis_explained(x, depth) for x in self.below[module])
            for module in leaf.ancestors
        )

    # Stacks along the second axis.

    def _is_shown(self, module: Module) -> bool:
        """Whether something below a module has an axis more than one layer would have."""
        if self._is_named(module) and module[-1] not in EXPERTS:
            return True
        for leaf in self.below[module]:
            if len(leaf.shape) > 1 and self.is_vector(leaf) and (leaf.name == "scale" or leaf.is_normalisation):
                return True
            bias, fits = self.bias_of(leaf)
            if len(bias) > 1 and 0 not in fits:
                return True
        return False

    def _shares_second(self, module: Module) -> bool:
        """Whether the second axis is the same for every leaf of the module, and biases without it fit."""
        leaves = self.below[module]
        if any(len(x.shape) < 2 or x.shape[1] != leaves[0].shape[1] for x in leaves):
            return False
        if all(len(x.shape) < 3 for x in leaves) or any(self.is_outputs_first(x) is not False for x in leaves):
            return False

        def is_layer(leaf: Leaf) -> bool:
            bias = self.shapes.get(bias_name(leaf))
            one = (*leaf.shape[:1], *leaf.shape[2:])
            enough = len(one) >= SMALLEST_RANK.get(leaf.name, 0)
            return enough and (bias is None or bool(_fits(one, (*bias[:1], *bias[2:]), False)))

        return all(is_layer(leaf) for leaf in leaves)

    def may_be_along_second(self, leaf: Leaf, depth: int) -> bool:
        """Whether a stack along the second axis explains some module of several layers, and nothing else does."""
        return not depth and any(
            module in self.sharing_second
            and sum(len(x.shape) > 2 for x in self.below[module]) > 1
            and not all(_is_axis_explained(x, depth, second=True) for x in self.below[module])
            for module in leaf.ancestors
        )

    @staticmethod
    def _outer(modules: set[Module]) -> set[Module]:
        """Those that are inside no other."""
        return {module for module in modules if not any(module[:k] in modules for k in range(len(module)))}

    # Experts, their router, and gated layers.

    def _routers(self, leaves: list[Leaf]) -> dict[Module, Leaf]:
        """The router of each module that has one."""
        matrices = [leaf for leaf in leaves if len(leaf.shape) > 1]
        return {leaf.names[:i]: leaf for leaf in matrices if (i := _router_at(leaf)) is not None}

    def is_expert(self, leaf: Leaf, depth: int) -> bool:
        """Whether it has a matrix for each expert that a router beside it chooses from."""
        shape = leaf.shape[depth:]
        for module in (leaf.names[:-1], leaf.names[:-2]):
            router = self.routers.get(module)
            sides = () if router is None or router is leaf else router.shape[depth:]
            if router is None or len(shape) != 3 or len(sides) != 2 or sides[0] == sides[1]:
                continue
            width, experts = sides[::-1] if self.is_outputs_first(router) else sides
            if shape[0] == experts and width in shape[1:]:
                return True
        return False

    def is_router(self, leaf: Leaf) -> bool:
        """Whether it chooses experts: by its name, a gate by the experts beside it too."""
        place = _router_at(leaf)
        if place is None or leaf.names[place] == "router":
            return place is not None
        module = leaf.names[:place]
        beside = [x for x in self.below[module] if x != leaf]
        inside = any(not EXPERTS.isdisjoint(x.names[len(module) :]) for x in beside)
        return inside or any(self.is_expert(x, len(leaf.shape) - 2) for x in beside)

    def gated_input(self, leaf: Leaf, depth: int) -> int | None:
        """Which axis is the input of Gemma's ``gating_einsum`` (2, in, hidden) or (2, hidden, in), by the layer after
        it, ``linear`` (hidden, in)."""
        if "gating_einsum" not in leaf.names[-2:]:
            return None
        block = leaf.names[: leaf.names.index("gating_einsum")]
        linear = self.shapes.get((*block, "linear")) or self.shapes.get((*block, "linear", "w")) or ()
        after, sides = linear[depth:], leaf.shape[depth + 1 :]
        if len(after) != 2 or len(sides) != 2 or after[0] == after[1] or sorted(sides) != sorted(after):
            return None
        return 1 + sides.index(after[1])


def _fits(shape: tuple[int, ...], bias: tuple[int, ...], outputs_first: bool) -> set[int]:
    """How many stacked axes would leave a bias that has the kernel's outputs: its last axes, or the first of it."""
    inputs = len(shape) - len(bias)
    if inputs <= 0:
        return set()
    if not outputs_first:
        return {k for k in range(len(bias)) if shape[:k] == bias[:k] and shape[inputs + k :] == bias[k:]}
    # One axis of outputs; as many of length 1 after it as a convolution has inputs and window, as in Equinox.
    ones = inputs == 1
    return {
        k
        for k in range(len(bias))
        if shape[: k + 1] == bias[: k + 1] and (k + 1 == len(bias) or (ones and set(bias[k + 1 :]) == {1}))
    }


def _router_at(leaf: Leaf) -> int | None:
    """Where a router's name stands in a path: its own, its module's, or that of one around a layer of its own."""
    last = len(leaf.names) - 1
    found = [i for i in (last, last - 1) if i >= 0 and leaf.names[i] in ROUTERS]
    return found[0] if found else last - 2 if last > 1 and leaf.names[last - 2] == "router" else None


def _is_axis_explained(leaf: Leaf, depth: int, second: bool = False) -> bool:
    """Whether a shared axis is no sign of a stack: one layer's inputs or heads, or the window of a convolution."""
    square = leaf.is_convolution and len(set(leaf.shape[depth:-2])) == 1
    name = leaf.module if leaf.name in ("w", "kernel") else leaf.name
    heads = leaf.module in ATTENTION_INPUTS or (second and leaf.module in ATTENTION_OUTPUTS)
    return len(leaf.shape) < depth + 3 or heads or square or name in EINSUMS
