"""What a graph takes and gives, and whether our runtime can feed it."""
