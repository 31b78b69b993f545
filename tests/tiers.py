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
    "test_benchmark*.py::*",
    "test_comparison.py::*",
    "test_default_compilation.py::*",
    "test_docs.py::*",
    "test_docstrings.py::test_examples_run",
    "test_examples.py::*",
    "test_dykaf_regimes.py::*",
    "test_experiment_*.py::*",
    "test_fisher_plots.py::*",
    "test_frog_cifar.py::*",
    "test_optax_suite.py::*",
    "test_peers.py::*",
    "test_readme.py::test_snippets_run_as_printed",
    "test_scaling.py::*",
    "test_step_time.py::*",
    # Properties of many methods, models, devices or compiled programs at once.
    "test_advice.py::*",
    "test_axes_experts.py::*",
    "test_capture_accumulate.py::*",
    "test_capture_cost.py::*",
    "test_capture_data_parallel.py::*",
    "test_capture_experts.py::*",
    "test_capture_fisher.py::*",
    "test_capture_shard*.py::*",
    "test_compression_layers.py::*",
    "test_compression_parts.py::*",
    "test_compression_roles.py::*",
    "test_compression_training*.py::*",
    "test_compression_vocabulary.py::*",
    "test_estimators_*.py::*",
    "test_experts*.py::*",
    "test_fisher_cost.py::*",
    "test_fisher_diagonal*.py::*",
    "test_fisher_experts.py::*",
    "test_fisher_head_float32.py::*",
    "test_fisher_layer_rows.py::*",
    "test_hyperparameters.py::*",
    "test_kfac_head.py::*",
    "test_kfac_inputs.py::*",
    "test_refresh.py::*",
    "test_rounding.py::*",
    "test_sharding.py::*",
    "test_statistics_axes.py::*",
    "test_trees_of_all_kinds.py::*",
    "test_warm_start.py::*",
    "test_tiers.py::test_each_law_is_in_one_tier_or_the_other",
    # Single ones that take as long as a file of others.
    "laws/test_calls.py::test_jitted_equals_eager",
    "test_axes_fused.py::test_the_program_reads_fused_experts_as_out_in_does",
    "test_axes_layouts.py::test_a_step_on_outputs_first_is_the_step_on_the_transpose",
    "test_axes_parts.py::test_a_start_from_adam_is_that_of_the_parts",
    "test_axes_parts.py::test_statistics_of_a_layer_are_those_of_its_parts",
    "test_axes_stacks.py::test_small_sizes_that_collide_are_never_misread",
    "test_axes_warning.py::test_what_is_made_anew_at_every_step_warns_once",
    "test_axes_warning.py::test_statistics_of_what_goes_to_the_fallback_by_its_name_are_named_at_the_trace",
    "test_capture_samples.py::test_samples_of_drawn_labels_are_scores",
    "test_compression_merging.py::test_operators_give_the_joint_minimiser_where_diagonals_do_not",
    "test_compression_prune.py::test_a_scanned_stack_is_pruned_as_the_blocks_it_stands_for",
    "test_compression_prune.py::test_fisher_and_obert_take_what_they_need",
    "test_dykaf.py::test_a_kronecker_sequence_is_followed_exactly",
    "test_dykaf.py::test_factors_stay_positive_semidefinite",
    "test_dykaf.py::test_single_precision_at_any_scale",
    "test_fisher_approximations.py::test_all_are_finite_for_singular_and_tiny_fishers_in_float32",
    "test_fisher_approximations.py::test_products_are_those_of_the_entries_under_jit_and_in_float32",
    "test_fisher_approximations.py::test_what_is_optimal_is_nearer_in_every_layer",
    "test_fisher_importance.py::test_rows_are_units_however_a_kernel_is_stored",
    "test_fisher_spectra.py::test_progress_wraps_the_vectors_and_the_blocks",
    "test_fisher_spectra.py::test_trace_lies_in_its_interval",
    "test_frog_inputs.py::test_a_stack_is_its_layers",
    "test_kfac.py::test_a_large_vocabulary_needs_no_square_of_it",
    "test_kfac.py::test_nothing_moves_before_the_first_statistics",
    "test_kl.py::test_zeros_before_the_first_gradient_move_nothing_without_eps",
    "test_linalg_cholesky_iteration.py::test_cholesky_follows_ill_conditioned_factors_as_qr_does",
    "test_linalg_eigenbasis.py::test_batched_equals_one_by_one",
    "test_linalg_eigenbasis.py::test_iteration_converges_to_the_eigenbasis",
    "test_linalg_products.py::test_the_polar_factor_in_blocks_is_the_reference",
    "test_linalg_roots.py::test_matrices_in_a_batch",
    "test_losses.py::test_other_weights_count_examples_so_many_times",
    "test_shampoo.py::test_before_the_start_it_is_the_graft",
    "test_trees.py::test_capture_takes_a_tree_that_could_be_called",
)
# Of a test with a case for each of many options, the first case is quick.
FIRST_CASE = (
    "test_axes_*.py",
    "test_capture_*.py",
    "test_compression_*.py",
    "test_dykaf.py",
    "test_fisher_*.py",
    "test_frog*.py",
    "test_kfac.py",
    "test_kl.py",
    "test_linalg_*.py",
    "test_losses.py",
    "test_muon.py",
    "test_near_shapes.py",
    "test_platforms.py",
    "test_reporting.py",
    "test_shampoo.py",
    "test_soap.py",
    "test_state_checks.py",
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
