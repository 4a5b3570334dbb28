"""Content-addressed stages on several processes; knows nothing of influence."""
