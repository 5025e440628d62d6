"""Many images from a file of jobs: validated first, generated one by one, resumed by content."""
