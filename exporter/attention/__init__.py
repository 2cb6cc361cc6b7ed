"""Finds attention, and measures what each layer keeps."""
