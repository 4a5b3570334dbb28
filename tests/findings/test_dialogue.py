"""The dialogue section of a profile: refused where malformed, left out without real text, fetched early or said why not."""

import numpy as np
import pytest
import yaml

from influence_kit.corpora.world import World
from influence_kit.errors import UserError
from influence_kit.findings import discovery
from influence_kit.findings import families as grid
from influence_kit.findings.common import dialogue, lines
from influence_kit.findings.profiles import FOLDER, load_profile
from influence_kit.publishing.costs import shape
from tests.test_packages import make_deb

CHAPTER = "06_role_play"


def own(tmp_path, **changes):
    content = yaml.safe_load((FOLDER / "smoke.yaml").read_text())
    content["dialogue"] |= changes
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "radio"}, "source 'radio' is not one of wesnoth, debs"),
        ({"source": "debs"}, "'debs' needs one"),
        ({"folder": "somewhere"}, "a folder goes with the source 'debs'"),
        ({"world": {"campains": ["did"]}}, "unknown parameter 'campains'; known are .*campaigns"),
        ({"arms": {"bad": {"world": {"queries": 0}}}}, "queries=0 must be 1 or more"),
    ],
)
def test_malformed_sections_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=f"^profile own.yaml: dialogue: .*{message}"):
        load_profile(own(tmp_path, **changes))


def test_arms_share_the_lines_and_differ_in_the_world(tmp_path):
    profile = load_profile(own(tmp_path, arms={"unnamed": {"world": {"named": False}}}), [0])
    found = grid.dialogue_grid(profile, ("base", "unnamed", "no_such_arm"))
    assert [trained.arm for trained in found] == ["base", "unnamed"]
    base, unnamed = (trained.world for trained in found)
    assert base.inputs["text"].fingerprint == unnamed.inputs["text"].fingerprint
    assert unnamed.parameters == base.parameters | {"named": False}
    assert shape(base) == (360, 48, 400) and base.inputs["text"].early
    assert grid.dialogue_grid(load_profile("smoke", real_text=False)) == []


def test_lines_that_cannot_be_fetched_are_said_before_any_work(monkeypatch, tmp_path):
    stages = discovery.stages_for(load_profile("smoke"), CHAPTER)
    missing = discovery.stages_for(load_profile(own(tmp_path, source="debs", folder=str(tmp_path / "no"))), CHAPTER)
    with pytest.raises(UserError, match="does not exist"):
        discovery.text_is_in_reach(missing)
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get anywhere
    with pytest.raises(UserError, match=r"apt-get is not on this machine.*wesnoth-<series>-<campaign>_\*.deb"):
        discovery.text_is_in_reach(stages)


def test_stages_make_a_world_of_packages_in_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    said = [
        (rng.choice(["Orla", "Tamsin"]), " ".join(rng.choice("kettle lamp table letter".split(), 5)))
        for _ in range(460)
    ]
    scene = "".join(
        f'[message]\nspeaker={who}\nmessage= _ "{what} {n}"\n[/message]\n' for n, (who, what) in enumerate(said)
    )
    path = "usr/share/games/wesnoth/1.16/data/campaigns/Lamp/scenarios/01_Lamp.cfg"
    debs, text, out = tmp_path / "debs", tmp_path / "text", tmp_path / "out"
    make_deb(debs / "wesnoth-1.16-did_1_all.deb", "wesnoth-1.16-did", "1", {path: scene.encode()})
    profile = load_profile(own(tmp_path, source="debs", folder=str(debs)), [0])
    stage = next(trained.world for trained in grid.dialogue_grid(profile))
    text.mkdir()
    lines(stage.inputs["text"].parameters, {}, text, None)
    per_speaker = {"per_speaker": 6}  # two speakers only
    dialogue(stage.parameters | per_speaker, {"text": text}, out, None)
    world = World.load(out)
    assert world.sequences.num_rows == 360 and world.queries.num_rows == 12 and world.name == "dialogue"
