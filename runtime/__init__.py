"""Runs an exported folder: sessions, the KV cache, generation."""
