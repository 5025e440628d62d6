"""CLEAR weights: their format, loading and saving, and what a model was before them."""
