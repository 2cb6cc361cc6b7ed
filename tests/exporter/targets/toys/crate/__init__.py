"""A toy target in a folder of its own."""
