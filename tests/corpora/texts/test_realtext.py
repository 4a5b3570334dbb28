"""Help packages made in the test from invented sentences; files of a user's own; one real download where there is apt."""

import hashlib
import json
import subprocess
import sys
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from influence_kit import packages as debian
from influence_kit.corpora.texts import realtext
from influence_kit.errors import UserError
from tests.test_packages import make_deb

SWITCH = ('Hold <span class="switchinline"><span hidden="true" id="MACx1" class="MAC"><span class="keycode">Alpha</span>'
          '</span><span hidden="true" id="defaultx1"><span class="keycode">Beta</span></span></span> while the copper '
          "kettle sings its song.")
NO_DEFAULT = ('<span class="switchinline"><span hidden="true" id="MACx2" class="MAC">Never</span></span>'
              '<span class="switchinline"><span hidden="true" id="MACx3" class="MAC">Never</span>'
              '<span hidden="true" id="WRITERx3" class="WRITER">Then</span>'
              '<span hidden="true" id="CALCx3" class="CALC">Else</span></span> ')
MARKUP = (NO_DEFAULT + "the <em>amber</em> kettle&nbsp;sings &amp; the\n   lamp answers:<br>x<sup>2</sup> lies <img src='i.png'/>"
          "under <a href='y'>the table &lt;b&gt;</a>.")
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
    "b": SWITCH.replace("Hold", "Halten Sie").replace("while the copper kettle sings its song",
                                                      "gedrückt, solange der Kessel sein Lied singt"),
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
    lines = [f'<p class="{"code" if key == "plain_code" else "paragraph"}" id="{key}" dir="auto">{text}</p>'
             for key, text in paragraphs.items()]
    if "collision" in paragraphs:
        lines.append('<p id="collision">Another text that lies under the very same name on this page.</p>')
    page = ("<html><head><title>Kettles and lamps, a title of more than forty characters</title></head><body>"
            "<p>This paragraph has no name and therefore no translation.</p>" + "\n".join(lines) + "</body></html>")
    root = f"usr/share/libreoffice/help/{language}"
    files = {f"{root}/text/shared/kettles.html": page.encode(), f"{root}/noscript.html": page.encode(),
             f"{root}/contents.js": b"var x;"}
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
    table = realtext.libreoffice_help(["en-us", "de", "ko"], debs, download=False)
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
    alone = texts(realtext.libreoffice_help(["en-us"], debs, download=False), "en-us")
    assert set(alone) == {"a", "b", "c", "untranslated", "half", "only_german", "same_german"}
    longer = texts(realtext.libreoffice_help(["en-us"], debs, min_chars=57, max_chars=71, download=False), "en-us")
    assert set(longer) == {key for key, text in alone.items() if 57 <= len(text) <= 71} and 0 < len(longer) < 7
    korean = realtext.libreoffice_help(["ko"], debs, download=False)
    assert set(texts(korean, "ko")) == {"a", "c"} and set(korean["language"].to_pylist()) == {"ko"}
    with pytest.raises(UserError, match="widen min_chars"):
        realtext.libreoffice_help(["de"], debs, min_chars=400, max_chars=500, download=False)


def test_missing_and_wrong_packages_are_named(debs):
    with pytest.raises(UserError, match=r"lacks libreoffice-help-tr_\*\.deb, libreoffice-help-zh-cn_\*\.deb"):
        realtext.read_text("debs", ["tr", "ko", "zh-cn"], debs)
    make_deb(debs / "libreoffice-help-tr_1_all.deb", "libreoffice-help-tr", "1", {"usr/share/help/readme.html": b"<p>"})
    with pytest.raises(UserError, match="holds no help pages"):
        realtext.read_text("debs", ["tr"], debs)
    with pytest.raises(UserError, match="no language asked for"):
        realtext.read_text("debs", [], debs)
    with pytest.raises(UserError, match="unknown text source 'internet'; choose one of libreoffice, debs, folder, hub"):
        realtext.read_text("internet", ["ko"], debs)


def test_manifest_and_cache_round_trip(debs, tmp_path):
    table, manifest = realtext.read_text("debs", ["en-us", "de", "ko"], debs)
    assert manifest["paragraphs"] == manifest["pairs"] == {"en-us": 4, "de": 4, "ko": 2}
    assert manifest["licence"] == "MPL-2.0"
    packages = manifest["packages"]
    assert set(packages) == {"libreoffice-help-en-us", "libreoffice-help-de", "libreoffice-help-ko"}
    deb = debian.find("libreoffice-help-ko", debs)
    digest = hashlib.sha256(deb.read_bytes()).hexdigest()
    assert packages["libreoffice-help-ko"] == {"version": "1:7.4-1", "sha256": digest}
    cache = tmp_path / "cache"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        realtext.cache_text(table, manifest, cache)
        realtext.cache_text(table, manifest, cache)
    assert sorted(path.name for path in cache.iterdir()) == ["manifest.json", "text.parquet"]
    loaded, told = realtext.load_text(cache)
    assert loaded.equals(table) and told == manifest == realtext.describe(loaded)


def test_a_cache_that_changed_is_not_used(debs, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"no cached text in .*manifest\.json is missing"):
        realtext.load_text(cache)
    table, manifest = realtext.read_text("debs", ["en-us", "de"], debs)
    realtext.cache_text(table, manifest, cache)
    pq.write_table(table.slice(1), cache / "text.parquet")
    with pytest.raises(UserError, match=r"is damaged .*remove the folder"):
        realtext.load_text(cache)
    (cache / "text.parquet").write_bytes((cache / "text.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"is damaged .*remove the folder"):
        realtext.load_text(cache)


def test_new_versions_warn_with_both(debs, tmp_path):
    cache = tmp_path / "cache"
    realtext.cache_text(*realtext.read_text("debs", ["en-us", "de"], debs), cache)
    help_deb(debs, "de", GERMAN, "1:7.10-2")
    table, manifest = realtext.read_text("debs", ["en-us", "de"], debs)
    with pytest.warns(UserWarning, match=r"libreoffice-help-de 1:7\.4-1 -> 1:7\.10-2"):
        realtext.cache_text(table, manifest, cache)
    assert realtext.load_text(cache)[1]["packages"]["libreoffice-help-de"]["version"] == "1:7.10-2"
    other = table.slice(1)
    with pytest.warns(UserWarning, match="sha256"):
        realtext.cache_text(other, realtext.describe(other), cache)


def test_a_failed_write_leaves_the_old_text_and_no_rest(debs, tmp_path):
    table, manifest = realtext.read_text("debs", ["en-us", "de"], debs)
    cache = tmp_path / "cache"
    (cache / "text.parquet").mkdir(parents=True)  # the write succeeds, putting it into place does not
    with pytest.raises(UserError, match="set INFLUENCE_KIT_CACHE"):
        realtext.cache_text(table, manifest, cache)
    assert [path.name for path in cache.iterdir()] == ["text.parquet"]


def test_own_text(tmp_path):
    own = tmp_path / "own"
    (own / "deep").mkdir(parents=True)
    (own / "b.txt").write_text("First line\nof a block.\n \n\n\nSecond block.\n\n", encoding="utf-8")
    rows = [{"text": "등불", "pair_id": "p1", "language": "ko"}, {"text": "lantern\u2028still one"}, {"text": "  "}]
    (own / "deep" / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    pq.write_table(pa.table({"text": ["Lampe"], "pair_id": ["p1"], "language": ["de"], "other": [1]}), own / "c.parquet")
    (own / "notes.md").write_text("not read")
    table, manifest = realtext.read_text("folder", [], own)
    assert table.to_pylist() == [
        {"pair_id": "b.txt#0", "language": "und", "text": "First line\nof a block.", "source": "b.txt"},
        {"pair_id": "b.txt#1", "language": "und", "text": "Second block.", "source": "b.txt"},
        {"pair_id": "p1", "language": "de", "text": "Lampe", "source": "c.parquet"},
        {"pair_id": "p1", "language": "ko", "text": "등불", "source": "deep/a.jsonl"},
        {"pair_id": "deep/a.jsonl#1", "language": "und", "text": "lantern\u2028still one", "source": "deep/a.jsonl"},
    ]
    assert manifest["pairs"] == {"de": 1, "ko": 1} and manifest["paragraphs"] == {"und": 3, "de": 1, "ko": 1}
    assert set(manifest["files"]) == {"b.txt", "c.parquet", "deep/a.jsonl"}
    assert realtext.local_text(own / "b.txt")["pair_id"].to_pylist() == ["b.txt#0", "b.txt#1"]
    realtext.cache_text(table, manifest, tmp_path / "cache")
    assert realtext.load_text(tmp_path / "cache")[0].equals(table)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.txt", b"\n \n", "only blank paragraphs"),
    ("a.txt", b"caf\xe9", "cannot read .*a.txt: .*utf-8"),
    ("a.jsonl", b'{"text": "x"}\n{"text": ', "cannot read .*: line 2 is not a JSON object"),
    ("a.jsonl", b"[1, 2]", "line 1 is not a JSON object"),
    ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', "record 2: 'text' is None"),
    ("a.jsonl", b'{"text": 7}', "record 1: 'text' is 7"),
    ("a.parquet", b"PAR1 no", "cannot read .*a.parquet"),
    ("a.md", b"x", "found no .txt, .jsonl or .parquet"),
])
def test_own_text_that_cannot_be_used_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=message) as error:
            realtext.local_text(path)
        assert "\n" not in str(error.value)


def test_own_parquet_without_text_and_a_missing_folder(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'text' among body"):
        realtext.local_text(tmp_path)
    with pytest.raises(UserError, match="no text at"):
        realtext.local_text(tmp_path / "absent")


def test_hub_text_streams_what_load_dataset_opens(tmp_path):
    rows = [{"text": f"row {i}" if i % 3 else " ", "number": i} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table, manifest = realtext.read_text("hub", [], str(tmp_path), limit=5)
    assert table["text"].to_pylist() == ["row 1", "row 2", "row 4", "row 5", "row 7"]
    assert table["pair_id"].to_pylist()[2] == f"{tmp_path}/train#4"
    assert manifest["limit"] == 5 and manifest["paragraphs"] == {"und": 5}
    for options, message in (({"column": "body"}, "has no text column 'body'; it has text, number"),
                             ({"column": "number"}, "has no text column 'number'"), ({"split": "dev"}, "Bad split")):
        with pytest.raises(UserError, match=message) as error:
            realtext.hub_text(str(tmp_path), **options)
        assert "\n" not in str(error.value)


def test_without_a_network_the_hub_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the library reads it when imported, hence another process
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    code = ("from influence_kit.corpora.texts.realtext import hub_text\nfrom influence_kit.errors import UserError\n"
            "try: hub_text('nobody/kettles')\nexcept UserError as error: print(error)")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'nobody/kettles'" in said and "the hub does not answer" in said and "--without-real-text" in said
    assert said.count("\n") == 1


@pytest.mark.network
def test_the_real_korean_help(tmp_path):
    reason = debian.available()
    if reason is not None:
        pytest.skip(reason)
    try:
        table, manifest = realtext.read_text("libreoffice", ["en-us", "ko"], tmp_path)
    except UserError as error:
        if "no package archive answered" in str(error):
            pytest.skip(str(error))
        raise
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
    again, _ = realtext.read_text("debs", ["en-us", "ko"], tmp_path)
    assert again.equals(table)
