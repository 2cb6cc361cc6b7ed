"""Which layers get the triangle."""
