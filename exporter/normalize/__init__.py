"""Many spellings of a graph become fewer, without a change of meaning."""
