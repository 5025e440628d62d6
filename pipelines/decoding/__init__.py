"""Latents to images and back in tiles that leave no seam, and files written strip by strip."""
