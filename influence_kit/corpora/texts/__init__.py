"""Real text, one source a file."""
