"""What a person sees: figures, token cards, fonts."""
