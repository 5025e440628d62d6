"""One image by several ranks, exactly: bands of rows, what travels, and who watches whom."""
