"""The package's microbenchmark: one edit, forward and backward, against its peers. Run by ``benchmarks.run``."""
