"""What a model takes at a size, FLOPs and memory, without its weights."""
