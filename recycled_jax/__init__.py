"""Long-context decoding with recycled selections, in JAX."""
