"""The demo pipeline: its world, and how it was trained."""
