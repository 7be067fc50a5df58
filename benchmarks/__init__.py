"""Studies: one file each, run as `python -m benchmarks.NAME`; results/*.json first, figures from the JSON alone."""
