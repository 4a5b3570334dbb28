"""Spoken lines from campaigns written in the test; one real download where there is apt."""

import json

import pytest

from influence_kit import packages as debian
from influence_kit.corpora.texts.paragraphs import describe
from influence_kit.corpora.texts.wesnoth import campaign_lines, expand, nodes, plain
from influence_kit.errors import UserError
from tests.test_packages import make_deb

FOLDER = "usr/share/games/wesnoth/1.20/data/campaigns/Copper_Kettle"
FIRST = """#textdomain wesnoth-ck
# don't "trip over this quote
[scenario]
    name= _ "The Lamp"
    [side]
        side=1
        {HERO}
        [unit]
            id=Tamsin
            side=2
        [/unit]
    [/side]
    {NAMED_LOYAL_UNIT 2 (Spearman) 5 6 (Odo) ( _ "Odo")}
    [event]
        [message]
            speaker=Orla
            message= _ "The kettle <i>sings</i>,
    and says ""wait"" &amp; nothing" + _ " more."
        [/message]
        [message]
            speaker="Tamsin"  # wmllint: recognize Tamsin
            caption= _ "Tamsin"
            message=_"Then we wait."  # po: "now"
            [option]
                message= _ "Never said aloud"
            [/option]
        [/message]
        [message]
            speaker=unit
            message= _ "Nobody in particular."
        [/message]
        [message]
            speaker=Orla
            message= _ "You are $name|!"
        [/message]
        {MESSAGE Odo () () _ "Unread, being an argument."}
#ifdef HARD
        [message]
            speaker=Orla
            message= _ "Twice."
        [/message]
#else
        [message]
            speaker=Orla
            message= _ "Twice."
        [/message]
#endif
        [lua]
            code = << wesnoth.message("[message]", "speaker=Orla") >>
        [/lua]
    [/event]
[/scenario]
"""
SECOND = """[scenario]
    [side]
        side=3
        id=Orla
    [/side]
    {HERO_SPEAKS}
    [message]
        speaker=narrator
        message= _ "Twice."
    [/message]
[/scenario]
"""
MACROS = """#define HERO
    id=Orla
    name= _ "Orla"
#enddef
#define HERO_SPEAKS
    [message]
        {HERO}
        speaker=Orla
        message= _ "From a macro."
    [/message]
    [message]
        speaker=Orla
        message= _ "Twice."
    [/message]
#enddef
"""
FILES = {f"{FOLDER}/scenarios/01_Lamp.cfg": FIRST, f"{FOLDER}/scenarios/02_Table.cfg": SECOND,
         f"{FOLDER}/utils/macros.cfg": MACROS, f"{FOLDER}/_main.cfg": "[campaign]\n[/campaign]\n"}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for series in ("1.9", "1.20"):
        name = f"wesnoth-{series}-ck"
        files = {path: content.encode() for path, content in FILES.items()}
        make_deb(tmp_path / f"{name}_1_all.deb", name, f"{series}.1-1", files)
    return tmp_path


def test_lines_of_named_speakers_in_order(folder):
    table = campaign_lines(["ck"], folder, download=False)
    said = [(row["scenario"], row["speaker"], row["side"], row["text"]) for row in table.to_pylist()]
    assert said == [
        ("01_Lamp", "Orla", "1", 'The kettle sings , and says "wait" & nothing more.'),
        ("01_Lamp", "Tamsin", "2", "Then we wait."),
        ("01_Lamp", "Orla", "1", "Twice."),
        ("02_Table", "Orla", "1", "From a macro."),
        ("02_Table", "narrator", "", "Twice."),
    ]
    assert table["order"].to_pylist() == list(range(5)) and len(set(table["pair_id"].to_pylist())) == 5


def test_the_newest_series_at_hand_is_read_and_recorded(folder):
    about = describe(campaign_lines(["ck"], folder, download=False))
    assert list(about["packages"]) == ["wesnoth-1.20-ck"] and about["licence"] == "GPL-2+"
    assert about["packages"]["wesnoth-1.20-ck"]["version"] == "1.20.1-1" and about["paragraphs"] == {"en": 5}


def test_what_is_missing_is_named(folder, tmp_path_factory):
    with pytest.raises(UserError, match=r"lacks wesnoth-1.20-zz_\*.deb"):
        campaign_lines(["ck", "zz"], folder, download=False)
    with pytest.raises(UserError, match="holds no wesnoth-<series>"):
        campaign_lines(["ck"], tmp_path_factory.mktemp("empty"), download=False)
    with pytest.raises(UserError, match="no campaign asked for"):
        campaign_lines([], folder, download=False)
    make_deb(
        folder / "wesnoth-1.20-mute_1_all.deb", "wesnoth-1.20-mute", "1", {f"{FOLDER}/scenarios/1.cfg": b"[a]\n[/a]"}
    )
    with pytest.raises(UserError, match="holds no spoken line"):
        campaign_lines(["mute"], folder, download=False)


def test_without_apt_the_remedy_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"apt-get is not on this machine.*--without-real-text"):
        campaign_lines(["ck"], tmp_path)


def test_tags_that_a_macro_opens_or_closes_do_not_swallow_others():
    found = list(nodes('[a]\nx=1\n[b]\ny= _ "two"\n[/a]\n[/c]\n[message]\nspeaker=Z\n[/message]\n'))
    assert found == [("a", {"x": "1"}), ("message", {"speaker": "Z"})]


def test_macros_are_expanded_inside_macros_and_not_forever():
    assert expand("{A} {B 1} {C}", {"A": "<{D}>", "D": "d"}) == "<d> {B 1} {C}"
    assert expand("{A}", {"A": "{A}"}) == "{A}"


def test_variables_are_no_speech():
    assert plain("Hello $who|") == plain("Hello {NAME}") == "" and plain(" a\n  b ") == "a b"


@pytest.mark.network
@pytest.mark.slow
def test_a_real_campaign_comes_whole(tmp_path):
    if problem := debian.available():
        pytest.skip(problem)
    try:
        table = campaign_lines(["did"], tmp_path)
    except UserError as error:
        if "cannot fetch" in str(error) or "no package" in str(error):
            pytest.skip(str(error))
        raise
    rows = table.to_pylist()
    assert len(rows) > 200 and len({row["scenario"] for row in rows}) >= 10
    most = max({row["speaker"] for row in rows}, key=[row["speaker"] for row in rows].count)
    assert "Malin" in most or most == "narrator"
    assert not any(mark in row["text"] for row in rows for mark in ("[", "$", "{", '_ "'))
    assert json.loads(table.schema.metadata[b"origin"])["licence"] == "GPL-2+"
