"""Corpora with planted truth."""
