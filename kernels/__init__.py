"""What makes the algorithm fast; nothing in here knows of reinforcement learning."""
