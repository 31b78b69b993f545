"""Everything that is claimed in numbers, measured: `python -m benchmarks` lists what there is.

``speed``
    Seconds, bytes and flops: an optimizer's step alone (`step_time`), in a training step (`train_step`), with
    statistics (`capture_cost`), by size (`scaling`), by compiler (`compiled`); single routines.
``training``
    Losses at the best rate of a grid: runs of the package `experiments`, kept in files, and tables of them.
``tools``
    Errors and gains of the Fisher, of compression and of axes.

Beside these: `harness` runs the clock, `results` has the one form of results, `flops` counts products, `trees` has the
parameters of GPTs, `pictures` draws, `page` writes the tables of README and docs and the page of results.

A benchmark is a module with a docstring, whose first line says what it measures, and two or three functions:
``add_options``, of a parser; ``measure``, of the options (with ``command``, what to type for them), which yields
results as soon as they are there, with more of it later if need be; and perhaps ``draw``, the picture of a result.
"""
