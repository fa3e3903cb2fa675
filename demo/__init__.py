"""What `make demo` runs, and the small real model and real text that tests and benchmarks share with it."""
