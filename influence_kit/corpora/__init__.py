"""Corpora: worlds with planted truth, and real text. They know nothing of influence."""
