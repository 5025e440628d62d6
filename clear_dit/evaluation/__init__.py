"""Teacher against students, from the same seeds and prompts: pictures, metrics, table, sheet."""
