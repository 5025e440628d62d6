"""Distillation on samples the model made itself (arXiv 2412.16112, section 3.3)."""
