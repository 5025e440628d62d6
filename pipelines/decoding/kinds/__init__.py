"""Autoencoders of diffusers, a file for each kind: its layers as segments, its scaling."""
