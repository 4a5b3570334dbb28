"""Corpora with planted truth."""

from influence_kit.corpora.worlds.atlas import Atlas
from influence_kit.corpora.worlds.cast import Cast
from influence_kit.corpora.worlds.deep import Deep
from influence_kit.corpora.worlds.ladder import Ladder
from influence_kit.corpora.worlds.procedures import Procedures

WORLDS = {"atlas": Atlas, "cast": Cast, "deep": Deep, "ladder": Ladder, "procedures": Procedures}
