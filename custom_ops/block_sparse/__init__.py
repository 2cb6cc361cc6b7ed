"""`trianglemix::BlockSparseAttention`: each head keeps the blocks that hold most of its mass."""
