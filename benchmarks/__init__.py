"""Everything that is claimed in numbers, measured: `python -m benchmarks` lists what there is."""
