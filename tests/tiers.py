"""Which tests are slow: `pytest` leaves them out, `pytest -m slow` runs them alone, `.ci/run` runs both.

A test is slow if the first table has it, or if it is one of many cases of which another is quick.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pytest

TESTS = Path(__file__).parent
SLOW = (
    # What tries the package as a whole: examples, measurements, pictures, documents' programs.
    "benchmarks/test_benchmarks.py::*",
    "benchmarks/test_compiled.py::*",
    "benchmarks/test_measures.py::*",
    "test_default_compilation.py::*",
    "documents/test_docs.py::*",
    "documents/test_docstrings.py::test_examples_run",
    "test_examples.py::*",
    "benchmarks/test_dykaf_regimes.py::*",
    "experiments/test_*.py::*",
    "fisher/test_plots.py::*",
    "benchmarks/test_frog_cifar.py::*",
    "optimizers/test_optax_suite.py::*",
    "benchmarks/test_peers.py::*",
    "documents/test_readme.py::test_snippets_run_as_printed",
    "benchmarks/test_scaling.py::*",
    "benchmarks/test_step_time.py::*",
    # Properties of many methods, models, devices or compiled programs at once.
    "test_advice.py::*",
    "matrices/test_axes_experts.py::*",
    "capture/test_accumulate.py::*",
    "capture/test_cost.py::*",
    "capture/test_data_parallel.py::*",
    "capture/test_experts.py::*",
    "capture/test_fisher.py::*",
    "capture/test_shard*.py::*",
    "compression/test_layers.py::*",
    "compression/test_parts.py::*",
    "compression/test_roles.py::*",
    "compression/test_training*.py::*",
    "compression/test_vocabulary.py::*",
    "fisher/test_estimators_*.py::*",
    "optimizers/test_experts*.py::*",
    "fisher/test_cost.py::*",
    "fisher/test_diagonal*.py::*",
    "fisher/test_experts.py::*",
    "fisher/test_head_float32.py::*",
    "fisher/test_layer_rows.py::*",
    "optimizers/test_hyperparameters.py::*",
    "optimizers/test_kfac_head.py::*",
    "optimizers/test_kfac_inputs.py::*",
    "preconditioner/test_refresh.py::*",
    "preconditioner/test_rounding.py::*",
    "optimizers/test_sharding.py::*",
    "matrices/test_statistics_axes.py::*",
    "test_trees_of_all_kinds.py::*",
    "states/test_warm_start.py::*",
    "test_tiers.py::test_each_law_is_in_one_tier_or_the_other",
    # An optimizer's step that is not compiled as a whole is some hundred programs: in one tier, they are compiled once.
    "laws/test_calls.py::test_arguments_are_not_mutated",
    "laws/test_calls.py::test_jitted_equals_eager",
    "laws/test_faults.py::test_health_is_found_under_wrappers",
    # Single ones that take as long as a file of others.
    "matrices/test_axes_fused.py::test_the_program_reads_fused_experts_as_out_in_does",
    "matrices/test_axes_layouts.py::test_a_step_on_outputs_first_is_the_step_on_the_transpose",
    "matrices/test_axes_parts.py::test_a_start_from_adam_is_that_of_the_parts",
    "matrices/test_axes_parts.py::test_statistics_of_a_layer_are_those_of_its_parts",
    "matrices/test_axes_stacks.py::test_small_sizes_that_collide_are_never_misread",
    "matrices/test_axes_warning.py::test_what_is_made_anew_at_every_step_warns_once",
    "matrices/test_axes_warning.py::test_statistics_of_what_goes_to_the_fallback_by_its_name_are_named_at_the_trace",
    "capture/test_samples.py::test_samples_of_drawn_labels_are_scores",
    "compression/test_merging.py::test_operators_give_the_joint_minimiser_where_diagonals_do_not",
    "compression/test_prune.py::test_a_scanned_stack_is_pruned_as_the_blocks_it_stands_for",
    "compression/test_prune.py::test_fisher_and_obert_take_what_they_need",
    "optimizers/test_dykaf.py::test_a_kronecker_sequence_is_followed_exactly",
    "optimizers/test_dykaf.py::test_factors_stay_positive_semidefinite",
    "optimizers/test_dykaf.py::test_single_precision_at_any_scale",
    "fisher/test_approximations.py::test_all_are_finite_for_singular_and_tiny_fishers_in_float32",
    "fisher/test_approximations.py::test_products_are_those_of_the_entries_under_jit_and_in_float32",
    "fisher/test_approximations.py::test_what_is_optimal_is_nearer_in_every_layer",
    "fisher/test_importance.py::test_rows_are_units_however_a_kernel_is_stored",
    "fisher/test_spectra.py::test_progress_wraps_the_vectors_and_the_blocks",
    "fisher/test_spectra.py::test_trace_lies_in_its_interval",
    "optimizers/test_frog_inputs.py::test_a_stack_is_its_layers",
    "optimizers/test_kfac.py::test_a_large_vocabulary_needs_no_square_of_it",
    "optimizers/test_kfac.py::test_nothing_moves_before_the_first_statistics",
    "optimizers/test_kl.py::test_zeros_before_the_first_gradient_move_nothing_without_eps",
    "linalg/test_cholesky_iteration.py::test_cholesky_follows_ill_conditioned_factors_as_qr_does",
    "linalg/test_eigenbasis.py::test_batched_equals_one_by_one",
    "linalg/test_eigenbasis.py::test_iteration_converges_to_the_eigenbasis",
    "linalg/test_products.py::test_the_polar_factor_in_blocks_is_the_reference",
    "linalg/test_roots.py::test_matrices_in_a_batch",
    "capture/test_losses.py::test_other_weights_count_examples_so_many_times",
    "optimizers/test_shampoo.py::test_before_the_start_it_is_the_graft",
    "test_trees.py::test_capture_takes_a_tree_that_could_be_called",
)
# Of a test with a case for each of many options, the first case is quick.
FIRST_CASE = (
    "matrices/test_axes_*.py",
    "capture/test_*.py",
    "compression/test_*.py",
    "optimizers/test_dykaf.py",
    "fisher/test_*.py",
    "optimizers/test_frog*.py",
    "optimizers/test_kfac.py",
    "optimizers/test_kl.py",
    "linalg/test_*.py",
    "optimizers/test_muon.py",
    "preconditioner/test_near_shapes.py",
    "preconditioner/test_platforms.py",
    "states/test_reporting.py",
    "optimizers/test_shampoo.py",
    "optimizers/test_soap.py",
    "states/test_state_checks.py",
)
# Of the laws, one row of each kind of optimizer; of one that has none of these, its first.
KINDS = ("soap", "muon", "kfac", "shampoo")


class Case(NamedTuple):
    """A test function with arguments: its file below `tests`, its name, and the arguments by name."""

    path: str
    function: str
    arguments: dict[str, Any]


def case(item: pytest.Item) -> Case:
    arguments = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return Case(item.path.relative_to(TESTS).as_posix(), getattr(item, "originalname", item.name), arguments)


def slow(cases: Sequence[Case]) -> list[bool]:
    """Of each case of one test function, whether it is slow."""
    path, function, _ = cases[0]
    if any(fnmatchcase(f"{path}::{function}", pattern) for pattern in SLOW):
        return [True] * len(cases)
    rows = [getattr(x.arguments.get("row"), "name", None) for x in cases]
    if any(row in KINDS for row in rows):
        return [row not in KINDS for row in rows]
    if any(rows) or any(fnmatchcase(path, pattern) for pattern in FIRST_CASE):
        return [i > 0 for i in range(len(cases))]
    return [False] * len(cases)
