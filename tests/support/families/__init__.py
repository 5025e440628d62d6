"""Tiny random models and pipelines of every family of transformers, and the oracle for them."""
