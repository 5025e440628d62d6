"""The web page: `clear-dit app`, a queue in front of one pipeline, pictures kept by visitor."""
