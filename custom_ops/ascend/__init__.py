"""Kernels of the operator for Ascend NPUs."""
