"""What looks at trained agents: acting with memory, watching, statistics."""
