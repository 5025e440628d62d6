"""Measurements: `clear-dit bench ...`. Each prints a table and a last line of JSON."""
