"""One run on a GPU; see `benchmarks/gpu.sh`."""
