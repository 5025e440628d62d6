"""The parts of benchmarks/gpu.py: each in processes of its own, with a file of its own."""
