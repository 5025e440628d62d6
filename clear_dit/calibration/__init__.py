"""Where attention pays: radii by layer and noise level, found by measuring a model."""
