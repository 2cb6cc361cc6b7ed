"""The operators: what they share, a folder for each, and the native library with their kernels."""
