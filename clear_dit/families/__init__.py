"""The families of models CLEAR knows: a small file each, and one table (`table.py`)."""
