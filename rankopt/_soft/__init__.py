"""Models whose layers compute with a mixture of ranks."""
