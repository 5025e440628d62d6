"""Teacher against students, from the same seeds and prompts: images, metrics, table, sheet."""
