"""Time and memory against torch and the libraries that deepsim_ext replaces: `python -m benchmarks.run`."""
