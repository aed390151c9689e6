"""The ways a task can be learned, side by side on the user's own rows, within a time budget."""
