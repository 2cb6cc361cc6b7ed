"""Accuracy tasks and time to first token, of exported folders and of Hugging Face models."""
