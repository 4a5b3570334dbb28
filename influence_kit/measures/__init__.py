"""Numbers from scores: tails, lifts, ranks, intervals, verdicts."""
