"""Which codec each block gets."""
