"""Cards show hostile text as text, keep every number, and have a PNG twin that says the same."""

import base64
import io
from html.parser import HTMLParser

import numpy
import pytest
from PIL import Image

from influence_kit.errors import UserError
from influence_kit.reading.card_model import LONGEST, Row, crop, direction, spans, visible
from influence_kit.reading.card_png import _flow
from influence_kit.reading.cards import median_query, query_card, side_by_side, which_query
from influence_kit.reading.fonts import BASE
from influence_kit.reading.style import NEGATIVE, POSITIVE

HOSTILE = [
    '<img src=x onerror="alert(1)">',
    '" onmouseover="alert(2)',
    "' style='x",
    "</style><script>",
    "&lt;",
    "\u202eabc",
]


def row(score=1.0, tokens=("shut", " down", " now"), scores=None, **facts) -> Row:
    scores = [score / len(tokens)] * len(tokens) if scores is None else scores
    return Row(list(tokens), score, facts.pop("rank", 1), token_scores=scores, **facts)


def card(*rows, **options):
    return query_card(["Will", " you"], [" stop"], rows or [row(), row(-2.0, rank=9)], **options)


class Markup(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)

    def handle_data(self, data):
        self.text += data


def test_nothing_from_the_data_becomes_markup():
    evil = row(tokens=HOSTILE + HOSTILE, scores=[1.0] * 6 + [0.0] * 6, language='"><script>', source="<b onclick=1>")
    shown = query_card(HOSTILE, HOSTILE, [evil], title="<script>alert(3)</script>")
    for html in (shown.html, side_by_side([shown, shown]).html, shown._repr_mimebundle_()[0]["text/html"]):
        markup = Markup(html)
        assert markup.tags <= {"div", "style", "h4", "h5", "p", "b", "span", "details", "summary", "img"}
        assert markup.attributes <= {"class", "dir", "title", "style", "alt", "src"}
        assert html.count("</style>") == 1 and "<script" not in html
        assert '<img src=x onerror="alert(1)">' in markup.text  # shown as text, whole


def test_controls_and_direction_overrides_are_visible():
    for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200B, 0x200E, 0xFEFF, 0x2028, 0xD800):
        assert visible(f"a{chr(code)}b") == f"a⟨U+{code:04X}⟩b"
    assert visible("a\nb\tc\x00\x1b\x7f") == "a↵ b⇥ c␀␛␡" and visible("می\u200cخواهم") == "می\u200cخواهم"
    shown = card(row(tokens=["user\u202e", "\u2066txt.exe"], language="\u202e"), title="\u202e")
    assert not set(shown.html + shown.alt) & set("\u202e\u2066") and shown.png


def test_direction_follows_the_letters():
    arabic = card(row(tokens=["قال", " النموذج", " GPT"]))
    assert 'dir="rtl"><span class="p20" title="+0.333">قال</span>' in arabic.html
    assert direction("שלום abc") == "rtl" and direction("123") == direction("한국") == "ltr"


def test_alignment_moves_scores_one_token():
    scored = row(scores=[1.0, -2.0, 0.0])
    assert spans(scored) == [("shut", 1.0), (" down", -2.0), (" now", 0.0)]
    assert spans(scored, "predicted") == [("shut", 0.0), (" down", 1.0), (" now", -2.0)]
    assert "predicted" in card(scored, alignment="predicted").alt
    with pytest.raises(UserError, match="sideways"):
        card(alignment="sideways")


def test_split_characters_padding_and_joiner():
    assert spans(row(tokens=["한", "", " x"], scores=[1.0, 2.0, 4.0])) == [("한", 3.0), (" x", 4.0)]
    padded = row(tokens=["a"] + ["<pad>"] * 9, scores=[1.0] + [0.5] * 9)
    assert spans(padded) == [("a", 1.0), (" ⟨padding ×9⟩", 4.5)]
    assert spans(row(tokens=["a", " �"], scores=[1.0, 2.0])) == [("a", 1.0), (" …", 2.0)]
    assert spans(row(tokens=["a", "b"]), joiner=" ") == [("a", 0.5), (" b", 0.5)]


def test_a_start_that_has_no_score_is_not_shown():
    started = row(tokens=["<bos>", "a", "b"], scores=[1.0, 2.0, 0.0])
    assert spans(started, "predicted", " ") == [("a", 1.0), (" b", 2.0)]
    assert spans(started)[0] == ("⟨start⟩", 1.0)  # shaded, thus shown
    shown = query_card(["<bos>", "a"], ["<eos>"], [row()])
    assert "bos" not in shown.html + shown.alt and "<b>⟨end⟩</b>" in shown.html


def test_scale_is_symmetric_clipped_and_said():
    scores = numpy.full(1000, 0.01)
    scores[3], scores[500] = 5.0, -5.0
    shown = card(row(tokens=["x"] * 1000, scores=scores))
    assert (
        shown.cards[0].clip == pytest.approx(0.01)
        and "to the raw score, strongest from ±0.01 on (2 of 1000 tokens are beyond)" in shown.html
    )
    assert 'class="p20" title="+5"' in shown.html and "whole sequence, 1000 tokens" in shown.html
    start = crop(spans(shown.cards[0].top[0]), 64)[1]
    assert len(start) == 65 and (max(start, key=lambda s: s[1]))[1] == 5.0
    small, large = side_by_side([card(row(0.001)), card(row(1.0))]).cards
    assert small.clip == pytest.approx(large.clip / 1000)  # each on its own


def test_top_and_bottom_by_sign_and_no_number_lost():
    rows = [row(score, rank=i + 1, nats_per_copy=score / 8e4, scored=12_000, bm25_rank=7, language="Turkish",
                source="news") for i, score in enumerate((9.0, 3.0, 1.0, -2.0, -4.0))]  # fmt: skip
    shown = card(*rows[::-1], k=2)
    assert [r.rank for r in shown.cards[0].top] == [1, 2] and [r.rank for r in shown.cards[0].bottom] == [5, 4]
    for text in (shown.html, shown.alt):
        assert "+0.000112 nats per copy (raw +9)" in text and "-2.5e-5 nats per copy (raw -2)" in text
        assert "Turkish · news · no token shared" in text and "#1 of 12,000 · " in text
    overlapping = row(tokens=["x", "Will", " you", "y"], scores=[0.0, 8.0, 0.0, 1.0], bm25_rank=7)
    assert card(overlapping).html.count("BM25 rank 7 · shares 2 tokens in a row</p>") == 1
    carried = row(tokens=["x", "Will", *"abcdefghijklmnopqrstuvwxyz"], scores=[9.0] + [0.01] * 27)
    assert "shares single tokens · sparse: one token carries it" in card(carried).html
    with pytest.raises(UserError, match="above or below 0"):
        card(row(0.0))
    with pytest.raises(UserError, match="2 token scores for 3 tokens"):
        assert card(row(scores=[1.0, 2.0])).html


def test_png_twin_is_stable_sized_and_coloured():
    rows = [row(1.0, tokens=["$x^2$ ", "$\\frac$ "] * 40), row(-1.0, tokens=["קטן", " والنموذج", " GPT"] * 30, rank=8)]
    first, second = card(*rows), card(*rows)
    assert first.png == second.png
    image = Image.open(io.BytesIO(first.png))
    assert image.size[0] == 1350 and 250 < image.size[1] < 900 and image.info["Description"] == first.alt
    pixels = numpy.asarray(image.convert("RGB")).astype(int)
    for colour in (POSITIVE, NEGATIVE):
        wanted = numpy.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert (abs(0.4 * 255 + 0.6 * wanted - pixels).max(-1) < 14).sum() > 1000  # shade at alpha .6
    assert (pixels[:, -10:] == 255).all()  # no text runs over the edge
    columns = side_by_side([first, second])
    assert Image.open(io.BytesIO(columns.png)).size[0] == (1120 + 20) * 1.5


def test_leftward_text_is_set_and_shaded_from_the_right():
    marks = []
    items = [
        ("שלום", 1.0, False),
        ("יה", -1.0, False),
        (" GPT", 0.0, False),
        (" abc", 0.0, False),
        (" סוף", 0.0, False),
    ]
    _flow(marks, items, 10, 0, 400, families=(BASE,))
    left = {mark[3]: mark[1] for mark in marks if mark[0] == "text"}
    assert left["סוף"] < left["GPT"] < left["abc"] < left["שלוםיה"]  # the Latin run keeps its own order
    first, second = [(mark[1], mark[1] + mark[3]) for mark in marks if mark[0] == "box"]
    assert first[1] == pytest.approx(410) and second[1] == pytest.approx(first[0]) and second[0] < first[0]


def test_notebook_bundle():
    shown = card()
    data, metadata = shown._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == shown.png and metadata["image/png"]["alt"] == shown.alt
    assert (
        data["text/html"].startswith('<img style="display:none" alt="Token card.') and shown.html in data["text/html"]
    )


def test_mathjax_is_told_to_leave_tokens_alone():
    for html in (card().html, side_by_side([card(), card()]).html):
        assert html.startswith('<div class="ikc') and "tex2jax_ignore mathjax_ignore" in html[:60]


def set_of(items, width=400.0):
    marks = []
    _flow(marks, items, 10, 0, width, families=(BASE,))
    return {mark[3]: mark[1] for mark in marks if mark[0] == "text"}, [mark for mark in marks if mark[0] == "box"]


def test_spaces_keep_their_width_wherever_they_stand():
    plain, _ = set_of([("a", 0.0, False), (" b", 0.0, False)])
    for items in (["a ", "b"], ["a", " ", "b"], ["a b"]):
        assert set_of([(text, 0.0, False) for text in items])[0] == plain
    assert set_of([("a", 0.0, False), ("    b", 0.0, False)])[0]["b"] > plain["b"] + 6
    _, (space, word) = set_of([("a", 0.0, False), (" ", 1.0, False), ("b", -1.0, False)])
    assert space[3] > 3 and space[1] + space[3] == pytest.approx(word[1])  # shaded side by side


def test_a_word_wider_than_the_line_is_broken_and_a_long_token_cut():
    placed, boxes = set_of([("W" * 60 + "M" * 9, 1.0, False), ("i" * 90, -1.0, False)], 300)
    assert all(set(line) <= set("WMi") for line in placed) and max(map(len, placed)) < 110 and len(placed) > 2
    assert all(10 <= box[1] and box[1] + box[3] <= 310.5 for box in boxes)
    long = card(row(tokens=["x" * 100_000, "W" * 100_000], scores=[1.0, 0.5]), title="t" * 3000)
    pixels = numpy.asarray(Image.open(io.BytesIO(long.png)).convert("L"))
    assert (
        (pixels[:, -10:] == 255).all()
        and "… ⟨100,000 characters⟩" in long.html
        and "x" * (LONGEST + 1) not in long.html
    )


def test_sequences_that_say_the_same_are_shown_once_where_asked():
    rows = [row(3.0 - i, tokens=["x", f" {i // 2}"], rank=i + 1, copies=2) for i in range(4)]
    assert [r.rank for r in card(*rows).cards[0].top] == [1, 2, 3]
    shown = card(*rows, distinct=True)
    assert [r.rank for r in shown.cards[0].top] == [1, 3] and "one of 2 copies" in shown.html


def test_foreign_text_has_its_english_below_and_a_card_a_caption():
    foreign = row(tokens=["heute", " Alice"], gloss="today <b>Alice</b>")
    shown = card(foreign, gloss="will you stop", caption="It contradicts & so on.")
    assert shown.html.count("English: ") == 2 and "today &lt;b&gt;Alice" in shown.html
    assert "It contradicts &amp; so on." in shown.html and shown.alt.endswith("It contradicts & so on.")
    small, plain = (Image.open(io.BytesIO(view.png)).size[1] for view in (shown, card(row(tokens=["heute", " Alice"]))))
    assert small > plain + 60  # three more lines
    both = side_by_side([shown, shown]).html
    assert both.count("English: will you stop") == 1 and both.count("It contradicts") == 1  # what both say stands once
    other = query_card(["Could"], [" he"], [row()])
    assert side_by_side([shown, other]).html.count("English: will you stop") == 1


def test_further_lists_stand_below_and_fewer_of_the_lowest():
    shown = card(row(), row(-2.0, rank=9), row(-1.0, rank=8), further={"Highest by RelatIF": [row(rank=3)]}, lowest=1)
    assert [(head, len(rows)) for head, rows in shown.cards[0].sections] == [
        ("Training texts that make the bold part more likely", 1),
        ("Less likely", 1),
        ("Highest by RelatIF", 1),
    ]
    assert len(card(row(), row(-1.0), lowest=0).cards[0].sections) == 1


def test_the_median_query_is_shown_and_said_to_contradict():
    values = [0.1, float("nan"), 0.5, 0.9, -0.2]
    assert median_query(values) == 0
    assert which_query(values, 0, 0.3, 0, "the large model's lead") == (
        "Shown is the median one of 5 queries: the large model's lead is 0.1 here, 0.3 over all."
    )
    assert "Shown is one query:" in (told := which_query(values, 4, 0.3, 0, "the lead")) and "contradicts" in told
    with pytest.raises(UserError, match="none of 1 queries"):
        median_query([float("nan")])


@pytest.mark.parametrize(("first", "second"), [("a", "b"), ("다음", "값"), ("say", "Wort")])
@pytest.mark.parametrize("bold", [False, True])
def test_a_space_takes_its_width_at_either_end_of_a_token(first, second, bold):
    (ended, boxes), (begun, _) = (
        set_of([(one, 1.0, False), (two, -1.0, bold)]) for one, two in ((f"{first} ", second), (first, f" {second}"))
    )
    assert ended[second] == pytest.approx(begun[second], abs=1)
    touching, _ = set_of([(first, 0.0, False), (second, 0.0, bold)])
    assert ended[second] > touching.get(second, 0) + 2 and boxes


def test_nothing_of_a_card_says_percentile_or_bos():
    shown = card(row(tokens=["<bos>", "a"], scores=[1.0, 2.0]), row(-1.0))
    for text in (shown.html, shown.alt):
        assert "percentile" not in text and "<bos>" not in text and "&lt;bos" not in text


def test_lists_say_what_they_are_about():
    heads = [query_card(prompt, ["stop"], [row()]).cards[0].sections[0][0] for prompt in (["will"], [])]
    assert heads == [f"Training texts that make {asked} more likely" for asked in ("the bold part", "this text")]
