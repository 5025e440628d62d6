"""The web page: `clear-dit app`, a queue in front of one pipeline, images kept by visitor."""
