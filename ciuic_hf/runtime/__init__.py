"""What a run itself allocates, compressed."""
