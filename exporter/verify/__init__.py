"""Compares an export with its source and with itself."""
