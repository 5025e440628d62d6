"""The attention layer's processor: what a sequence is made of, and CLEAR in a layer's place."""
