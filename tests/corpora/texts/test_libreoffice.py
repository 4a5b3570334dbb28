"""Help packages made in the test from invented sentences; one real download where there is apt."""

import hashlib
import json

import pyarrow as pa
import pytest

from influence_kit import packages as debian
from influence_kit.corpora.texts.libreoffice import libreoffice_help
from influence_kit.corpora.texts.paragraphs import describe, load_text, save_text
from influence_kit.corpora.texts.sources import read_text
from influence_kit.errors import UserError
from tests.test_packages import make_deb

SWITCH = (
    'Hold <span class="switchinline"><span hidden="true" id="MACx1" class="MAC"><span class="keycode">Alpha</span>'
    '</span><span hidden="true" id="defaultx1"><span class="keycode">Beta</span></span></span> while the copper '
    "kettle sings its song."
)
NO_DEFAULT = (
    '<span class="switchinline"><span hidden="true" id="MACx2" class="MAC">Never</span></span>'
    '<span class="switchinline"><span hidden="true" id="MACx3" class="MAC">Never</span>'
    '<span hidden="true" id="WRITERx3" class="WRITER">Then</span>'
    '<span hidden="true" id="CALCx3" class="CALC">Else</span></span> '
)
MARKUP = (
    NO_DEFAULT
    + "the <em>amber</em> kettle&nbsp;sings &amp; the\n   lamp answers:<br>x<sup>2</sup> lies <img src='i.png'/>"
    "under <a href='y'>the table &lt;b&gt;</a>."
)
ENGLISH = {
    "a": "The copper kettle sings when the morning is cold enough.",
    "b": SWITCH,
    "c": MARKUP,
    "repeated": "The copper kettle sings when the morning is cold enough.",
    "short": "Too short to be kept here.",
    "untranslated": "Nobody ever translated this sentence about seven lanterns.",
    "half": "The lantern keeper walks home slowly and counts every single step aloud.",
    "formula": "=SUM(A1;B2;C3;D4;E5;F6)+17.25*(G7-H8)/1024+3.14159-[22:33:44]",
    "collision": "Two gardens share this one name and so it must not be used.",
    "only_german": "The baker of the hill town writes letters to the miller.",
    "same_german": "The clerk of the hill town writes letters to the miller.",
    "plain_code": "kettle = open the lid of the kettle and pour the water out",
}
GERMAN = {
    "a": "Der kupferne Kessel singt, sobald der Morgen kalt genug ist.",
    "b": SWITCH.replace("Hold", "Halten Sie").replace(
        "while the copper kettle sings its song", "gedrückt, solange der Kessel sein Lied singt"
    ),
    "c": "Der Kessel singt &uuml;ber der Lampe, und die Lampe antwortet ihm.",
    "repeated": "Der Kessel aus Kupfer singt, wenn es morgens sehr kalt wird.",
    "short": "Zu kurz.",
    "untranslated": ENGLISH["untranslated"],
    "half": "Der Wächter geht nach Hause. The lantern keeper walks home slowly and counts every single step aloud.",
    "formula": "=SUMME(A1;B2;C3;D4;E5;F6)+17,25*(G7-H8)/1024+3,14159-[22:33:44]",
    "collision": "Zwei Gärten tragen diesen einen Namen und taugen darum nicht.",
    "only_german": "Der Bäcker der Stadt am Hügel schreibt dem Müller Briefe.",
    "same_german": "Der Bäcker der Stadt am Hügel schreibt dem Müller Briefe.",
    "plain_code": "Kessel = den Deckel des Kessels öffnen und das Wasser ausgießen",
}
KOREAN = {
    "a": "아침이 몹시 추우면 구리 주전자가 노래한다.",
    "b": "짧다.",
    "c": "주전자가 노래하면 등불이 탁자 아래에서 대답한다.",
}


def help_deb(folder, language: str, paragraphs: dict[str, str], version: str = "1:7.4-1"):
    lines = [
        f'<p class="{"code" if key == "plain_code" else "paragraph"}" id="{key}" dir="auto">{text}</p>'
        for key, text in paragraphs.items()
    ]
    if "collision" in paragraphs:
        lines.append('<p id="collision">Another text that lies under the very same name on this page.</p>')
    page = (
        "<html><head><title>Kettles and lamps, a title of more than forty characters</title></head><body>"
        "<p>This paragraph has no name and therefore no translation.</p>" + "\n".join(lines) + "</body></html>"
    )
    root = f"usr/share/libreoffice/help/{language}"
    files = {
        f"{root}/text/shared/kettles.html": page.encode(),
        f"{root}/noscript.html": page.encode(),
        f"{root}/contents.js": b"var x;",
    }
    name = f"libreoffice-help-{language}"
    return make_deb(folder / f"{name}_{version.replace(':', '%3a')}_all.deb", name, version, files)


@pytest.fixture
def debs(tmp_path):
    for language, paragraphs in (("en-us", ENGLISH), ("de", GERMAN), ("ko", KOREAN)):
        help_deb(tmp_path / "debs", language, paragraphs)
    return tmp_path / "debs"


def texts(table: pa.Table, language: str) -> dict[str, str]:
    rows = [row for row in table.to_pylist() if row["language"] == language]
    return {row["pair_id"].removeprefix("shared/kettles#"): row["text"] for row in rows}


def test_pairs_of_the_help(debs):
    table = libreoffice_help(["en-us", "de", "ko"], debs, download=False)
    assert table.schema.names == ["pair_id", "language", "text", "source"]
    german, english, korean = (texts(table, language) for language in ("de", "en-us", "ko"))
    # repeated: the English text is a's; half, untranslated: English copies; same_german: a text may stand only once.
    assert set(german) == {"a", "b", "c", "only_german"}
    assert german["a"] == GERMAN["a"] and german["c"] == "Der Kessel singt über der Lampe, und die Lampe antwortet ihm."
    assert german["b"] == "Halten Sie Beta gedrückt, solange der Kessel sein Lied singt."
    assert korean == {key: KOREAN[key] for key in ("a", "c")}, "Korean paragraphs may be shorter, but not any length"
    assert set(english) == set(german) | set(korean), "English rows are those with a translation"
    assert english["b"] == "Hold Beta while the copper kettle sings its song."
    assert english["c"] == "Then the amber kettle sings & the lamp answers: x^2 lies under the table <b>."
    assert set(table["source"].to_pylist()) == {f"libreoffice-help-{name} 1:7.4-1" for name in ("en-us", "de", "ko")}
    assert [row["language"] for row in table.to_pylist()] == ["en-us"] * 4 + ["de"] * 4 + ["ko"] * 2


def test_english_alone_needs_no_translation_and_lengths_are_respected(debs):
    alone = texts(libreoffice_help(["en-us"], debs, download=False), "en-us")
    assert set(alone) == {"a", "b", "c", "untranslated", "half", "only_german", "same_german"}
    longer = texts(libreoffice_help(["en-us"], debs, min_chars=57, max_chars=71, download=False), "en-us")
    assert set(longer) == {key for key, text in alone.items() if 57 <= len(text) <= 71} and 0 < len(longer) < 7
    korean = libreoffice_help(["ko"], debs, download=False)
    assert set(texts(korean, "ko")) == {"a", "c"} and set(korean["language"].to_pylist()) == {"ko"}
    with pytest.raises(UserError, match="widen min_chars"):
        libreoffice_help(["de"], debs, min_chars=400, max_chars=500, download=False)


def test_missing_and_wrong_packages_are_named(debs):
    with pytest.raises(UserError, match=r"lacks libreoffice-help-tr_\*\.deb, libreoffice-help-zh-cn_\*\.deb"):
        read_text("debs", ["tr", "ko", "zh-cn"], debs)
    make_deb(debs / "libreoffice-help-tr_1_all.deb", "libreoffice-help-tr", "1", {"usr/share/help/readme.html": b"<p>"})
    with pytest.raises(UserError, match="holds no help pages"):
        read_text("debs", ["tr"], debs)
    with pytest.raises(UserError, match="no language asked for"):
        read_text("debs", [], debs)
    with pytest.raises(UserError, match="unknown text source 'internet'; choose one of libreoffice, debs, folder"):
        read_text("internet", ["ko"], debs)


def test_text_is_kept_with_what_it_was_taken_from(debs, tmp_path):
    table = read_text("debs", ["en-us", "de", "ko"], debs)
    manifest = describe(table)
    assert manifest["paragraphs"] == manifest["pairs"] == {"en-us": 4, "de": 4, "ko": 2}
    assert manifest["licence"] == "MPL-2.0"
    packages = manifest["packages"]
    assert set(packages) == {"libreoffice-help-en-us", "libreoffice-help-de", "libreoffice-help-ko"}
    deb = debian.find("libreoffice-help-ko", debs)
    digest = hashlib.sha256(deb.read_bytes()).hexdigest()
    assert packages["libreoffice-help-ko"] == {"version": "1:7.4-1", "sha256": digest}
    save_text(table, tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["manifest.json", "text.parquet"]
    assert json.loads((tmp_path / "kept" / "manifest.json").read_text()) == manifest
    loaded = load_text(tmp_path / "kept")
    assert loaded.equals(table) and describe(loaded) == manifest


@pytest.mark.network
def test_the_real_korean_help(tmp_path):
    reason = debian.available()
    if reason is not None:
        pytest.skip(reason)
    try:
        table = read_text("libreoffice", ["en-us", "ko"], tmp_path)
    except UserError as error:
        if "no package archive answered" in str(error):
            pytest.skip(str(error))
        raise
    manifest = describe(table)
    assert set(manifest["packages"]) == {"libreoffice-help-en-us", "libreoffice-help-ko"}
    # 9,530 in 7.4.7; other releases are translated to another extent.
    assert manifest["pairs"]["ko"] == manifest["pairs"]["en-us"] > 5_000
    rows = table.to_pylist()
    assert len({(row["language"], row["text"]) for row in rows}) == len(rows)
    assert len({(row["language"], row["pair_id"]) for row in rows}) == len(rows)
    korean = [row["text"] for row in rows if row["language"] == "ko"]
    hangul = [any("가" <= character <= "힣" for character in text) for text in korean]
    assert sum(hangul) > 0.98 * len(korean)
    assert not any("class=" in text or "&nbsp;" in text or "</span" in text for text in korean)
    assert all(text == " ".join(text.split()) and 15 <= len(text) <= 300 for text in korean)
    assert read_text("debs", ["en-us", "ko"], tmp_path).equals(table)
