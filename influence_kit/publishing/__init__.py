"""From executed notebooks to figures, verdicts and README."""
