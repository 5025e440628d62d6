"""Many pictures from a file of jobs: validated first, painted one by one, resumed by content."""
