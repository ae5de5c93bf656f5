"""What steps environments in processes of their own: the loop over them, what it shares with the trainer, its life."""
