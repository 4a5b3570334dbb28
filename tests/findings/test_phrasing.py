"""Sentences follow what became of a claim."""

from influence_kit.findings.phrasing import by_verdict
from influence_kit.measures.claims import Rule, judged
from influence_kit.measures.intervals import over_seeds


def test_words_follow_the_verdict():
    rule = Rule("02-toy", "02_toy", "primary", "it grows", confirm_above=0, delta=0.5)
    words = ("grows", "shrinks", "stays", "is not clear")

    def told(*values: float) -> str:
        return by_verdict(judged(rule, over_seeds(dict(enumerate(values)))), *words)

    assert told(3, 3.1, 3.2) == "grows" and told(-3, -3.1, -3.2) == "shrinks"
    assert told(0.1, 0, -0.1) == "stays" and told(-3, 3, 1) == "is not clear"
