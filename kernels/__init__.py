"""What makes the algorithm fast, and is there for speed alone; nothing in here knows of reinforcement learning."""
