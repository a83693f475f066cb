"""Pictures of compressed models and plans, for the terminal and as PNG."""
