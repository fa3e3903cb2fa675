"""The code of `make demo`, and the small real model and real text that tests and benchmarks use as well."""
