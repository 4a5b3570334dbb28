"""Sentences follow what became of a claim."""

import dataclasses

from influence_kit.findings.phrasing import by_verdict, refereed
from influence_kit.measures.claims import Referee, Rule, judged
from influence_kit.measures.intervals import over_seeds


def test_words_follow_the_verdict():
    rule = Rule("02-toy", "02_toy", "primary", "it grows", confirm_above=0, delta=0.5)
    words = ("grows", "shrinks", "stays", "is not clear")

    def told(*values: float) -> str:
        return by_verdict(judged(rule, over_seeds(dict(enumerate(values)))), *words)

    assert told(3, 3.1, 3.2) == "grows" and told(-3, -3.1, -3.2) == "shrinks"
    assert told(0.1, 0, -0.1) == "stays" and told(-3, 3, 1) == "is not clear"


def test_a_referee_says_its_seeds_where_the_claim_has_others():
    rule = Rule("02-toy", "02_toy", "primary", "it grows", confirm_above=0, delta=0.5)
    claim = judged(rule, over_seeds({1: 3.0, 2: 3.1, 3: 3.2}))
    told = {2: "Retraining agrees: 2.1 [1.5, 2.7] nats (2 seeds).", 3: "Retraining agrees: 2.1 [1.5, 2.7] nats."}
    for number, sentence in told.items():
        by = Referee("retraining", 2.1, (1.5, 2.7), "nats", "confirmed", "agrees", dict.fromkeys(range(number), 2.1))
        assert refereed(dataclasses.replace(claim, referee=by)) == sentence
    assert refereed(claim) == ""
