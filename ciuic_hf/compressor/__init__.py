"""Any tensor in compressed blocks: for torch tensors and numpy arrays of any shape, without a model around them."""
