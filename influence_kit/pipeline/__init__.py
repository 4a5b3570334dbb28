"""Profiles, cached stages, cost plan, command line: the outermost room; nothing imports it but notebooks and the shell."""
