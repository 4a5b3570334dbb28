"""What each chapter reads, makes and measures."""
