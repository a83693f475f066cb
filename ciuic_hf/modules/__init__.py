"""torch modules whose weights are compressed, and swapping them into a model."""
