"""Puts the operator in, and checks what came out."""
