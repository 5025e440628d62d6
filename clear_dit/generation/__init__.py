"""One request, one image: its checks, the models by name, and the runner of a pipeline."""
