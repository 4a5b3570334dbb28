"""Profiles: all that ship are valid, unknown keys and names are refused in one line; grids follow from them."""

import sys
from types import SimpleNamespace

import pytest
import yaml

from influence_kit.corpora.world import World
from influence_kit.corpora.worlds.atlas import Atlas
from influence_kit.errors import UserError
from influence_kit.findings import discovery
from influence_kit.findings import families as grid
from influence_kit.findings.cross_lingual import on_one_world
from influence_kit.findings.is_ekfac_right import middle_width
from influence_kit.findings.profiles import FOLDER, PLANTED, QUERY_KINDS, load_profile, profile_names
from influence_kit.measures.checkpoints import READ
from influence_kit.publishing.costs import cost_of, shape
from influence_kit.runner import machine

WHOLE = [name for name in profile_names() if not load_profile(name).chapters]  # for every chapter


def test_the_promised_profiles_ship_and_are_valid():
    assert {"smoke", "laptop", "real", "gpu", "hub"} <= set(profile_names())
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name and profile.seeds
    assert len(load_profile("laptop").seeds) >= 3


def test_unknown_profile_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'labtop' is not known: choose one of .*laptop.*smoke"):
        load_profile("labtop")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("atlas", "world", "entitys"), 5, "unknown parameter 'entitys'; known are .*entities"),
        (("atlas", "world", "seed"), 5, "unknown parameter 'seed'"),
        (("atlas", "world", "noise_share"), 2, "noise_share=2"),
        (("atlas", "family", "recipe", "lr"), 5, "unknown parameter 'lr'"),
        (("atlas", "scan", "damping"), -1, "damping"),
        (("colour",), "red", "unknown parameter 'colour'; known are atlas, cast"),
        (("atlas", "colour"), "red", "atlas: unknown parameter 'colour'; known are arms, extra"),
        (
            ("atlas", "family", "architecture"),
            "rnn",
            "atlas.family.architecture='rnn' must be 'gpt_neox', 'llama' or 'gpt2'",
        ),
        (("atlas", "family", "recipe", "batch_size"), 0, "batch_size=0 must be greater than or equal to 1"),
        (("atlas", "family", "recipe", "batch_size"), -4, "batch_size=-4 must be"),
        (("atlas", "family", "recipe", "batch_size"), "32", "batch_size='32' must be a whole number"),
        (("atlas", "family", "recipe", "betas"), [0.9, 1.0], "betas.1=1.0 must be less than 1"),
        (("atlas", "family", "recipe", "checkpoints"), [0.5], "unknown parameter 'checkpoints'"),
        (("atlas", "family", "sizes"), [], "sizes=.* must have at least 1 item"),
        (("atlas", "family", "sizes", 0, "learning_rate"), float("inf"), "learning_rate=inf must be a finite number"),
        (("atlas", "family", "sizes", 0, "learning_rate"), "1e-3", r"learning_rate='1e-3' .*YAML reads 1e-3 as text"),
        (("atlas", "family", "sizes", 0, "width"), 24, "sizes.0.width: 24 must be 8 or a multiple of 16"),
        (("atlas", "scan", "fractions"), [1.5], "atlas.scan.fractions.0=1.5 must be less than 1"),
        (("atlas", "scan", "fractions"), [0.5, 0.2], "must rise"),
        (("atlas", "scan", "layers"), "(", "'\\(' must be mlp, all, or a regular expression"),
        (("atlas", "scan", "fit"), True, "fit=True must be a whole number"),
        (("atlas", "world", "documents"), "many", "documents='many' must be a whole number"),
        (("atlas", "world", "queries"), 0, "queries=0 must be"),
        (("atlas", "world", "repetitions"), [4, -1], "repetitions.1=-1 must be"),
        (("deep", "world", "atlas", "entitys"), 5, "unknown parameter 'entitys'"),
        (("deep", "world", "cast", "queries"), "20", "cast.queries='20' must be a whole number"),
        (("device",), "gpuu", "device='gpuu' must match"),
        (("seeds",), [], "seeds=.* must have at least 1 item"),
        (("seeds",), [1, 1], r"seeds: \[1, 1\] must be different"),
        (("seeds",), ["11"], "seeds.0='11' must be a whole number"),
        (("minutes",), float("nan"), "minutes=nan must be"),
        (("name",), "laptop", "says name: laptop, but a profile's name is its file's, own: take the line out"),
        (("atlas", "extra", "order", "querys"), 2, "order: unknown parameter 'querys'; known are instances, queries"),
        (("atlas", "extra", "order"), {"queries": 2}, "order.instances is missing: give it, such as"),
        (("atlas", "extra", "order", "queries"), 0, "order.queries=0 must be above 0"),
        (("atlas", "extra", "order", "queries"), "two", "order.queries='two' must be a whole number, such as"),
        (
            ("atlas", "extra", "rivals", "tracin"),
            [0.25, 1.0],
            r"tracin asks for \[0.25\].*kept at \[0.5, 1.0\]: add them to scan.fractions",
        ),
        (("little_atlas", "extra", "inverses", "lissa", "depth"), -1, "inverses.lissa.depth=-1 must be above 0"),
        (("text", "extra", "layers", "k"), 1, "unknown parameter 'k'; known are none"),
        (("atlas", "scan", "kinds"), ["alones"], "scan.kinds: 'alones' must be of fact, alone, translation, canary"),
        (("ladder", "extra", "solved", "asked"), ["rule", "fact"], "extra.solved.asked: 'fact' must be of rule"),
        (("text", "scan", "kinds"), ["fact"], "scan.kinds: 'fact' must be empty: these queries are of one kind"),
        (("dialogue", "scan", "kinds"), ["line"], "scan.kinds: 'line' must be empty"),
        (("text", "source"), "wikipedia", "source 'wikipedia' is not one of libreoffice, debs, folder"),
        (("text", "source"), "debs", "a folder goes with the source 'debs' or 'folder', and .* needs one"),
        (("atlas", "arms", "wide"), {"widths": [48]}, r"wide asks for widths \[48\], the family has \[16, 32\]"),
        (("atlas", "arms", "base"), {}, "'base' is the world as it stands"),
        (("atlas", "arms", "bad"), {"world": {"noise_share": 2}}, "^profile own.yaml: atlas: .*Atlas: noise_share=2"),
        (
            ("cast", "world", "entities"),
            5,
            "^profile own.yaml: cast: .*unknown parameter 'entities'; known are .*personas",
        ),
        (
            ("atlas", "arms", "bad"),
            {"again": 1, "world": {"shuffled": True}},
            "again=1 trains on the world as it stands: leave out world and without",
        ),
        (("atlas", "arms", "bad"), {"again": -1}, "again"),
        (
            ("cast", "arms", "bad"),
            {"world": {"answer_from": "memory"}},
            "answer_from='memory' must be one of imitation",
        ),
    ],
)
def test_bad_profiles_name_the_key_and_the_remedy(tmp_path, place, value, message):
    content = yaml.safe_load((FOLDER / "smoke.yaml").read_text())
    inner = content
    for key in place[:-1]:
        inner = inner[key] if isinstance(inner, list) else inner.setdefault(key, {})
    inner[place[-1]] = value
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message) as error:
        load_profile(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("# café".encode("latin-1"), "is not UTF-8 .byte 0xe9, line 1.: save it as UTF-8"),
        (b"seeds: [1]\nseeds: [2]", "key 'seeds' stands twice"),
        (b"seeds: [1", "is not YAML that can be read, mend it: .*line 1"),
        (b"a: " + b"[" * 100_000, "is not YAML that can be read"),
        (b"", "holds None, not keys and values: begin with a copy of"),
        (b"- a", r"holds \['a'\], not keys"),
        (b"\x00", "is not YAML that can be read"),
        (b"seeds: [1]", "purpose|minutes is missing"),
    ],
)
def test_a_file_that_holds_no_profile_is_refused_in_one_line(tmp_path, data, message):
    (tmp_path / "own.yaml").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        load_profile(str(tmp_path / "own.yaml"))
    assert "\n" not in str(error.value)


def test_a_profile_of_ones_own_is_found_from_where_one_stands_and_called_as_its_file(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbf" + (FOLDER / "smoke.yaml").read_bytes())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_profile("../mine.yaml").name == "mine"
    with pytest.raises(UserError, match=f"'mine.yaml': {tmp_path}/elsewhere/mine.yaml does not exist"):
        load_profile("mine.yaml")
    monkeypatch.setenv("INFLUENCE_KIT_CWD", str(tmp_path))  # a run computes elsewhere than where it was called
    assert load_profile("mine.yaml").name == "mine"
    with pytest.raises(UserError, match=f"'mine' is not known: .* such as {tmp_path}/mine.yaml"):
        load_profile("mine")


def test_folders_in_a_profile_start_from_where_one_stands(tmp_path, monkeypatch):
    content = yaml.safe_load((FOLDER / "smoke.yaml").read_text())
    content["text"] |= {"source": "folder", "folder": "pages"}
    content["text"]["family"]["sizes"] = [{"pretrained": "./models/one"}]
    content["text"] |= {"scan": {}, "extra": {}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=f"own.yaml: text.family.sizes.0.pretrained: .*{tmp_path}/models/one does not exist"
    ):
        load_profile("own.yaml")
    (tmp_path / "models" / "one").mkdir(parents=True)
    text = load_profile("own.yaml").text
    assert text.folder == str(tmp_path / "pages") and text.family.sizes[0].pretrained == str(
        tmp_path / "models" / "one"
    )


@pytest.mark.parametrize("seeds", [[], [1, 1], [-1], ["1"], [1.5], [True], "[11]", 11])
def test_bad_seeds_are_refused(seeds):
    with pytest.raises(UserError, match="seeds"):
        load_profile("smoke", seeds)


def test_other_seeds_make_other_stages_and_share_the_text():
    ours, theirs = load_profile("smoke", [1, 2]), load_profile("smoke", [2, 3])
    first, second = ({s.fingerprint: s for s in discovery.stages_for(p, "05_cross_lingual")} for p in (ours, theirs))
    shared = {stage.label for fingerprint, stage in first.items() if fingerprint in second}
    assert shared and all("seed 2" in label or label == "real text" for label in shared)


def test_without_real_text_nothing_reads_it():
    profile = load_profile("smoke", real_text=False)
    for chapter in discovery.chapters_for(profile):
        assert not any(stage.kind == "text" for stage in discovery.stages_for(profile, chapter))


def test_inputs_come_before_what_is_made_of_them():
    profile = load_profile("laptop")
    for chapter in discovery.chapters_for(profile):
        seen = set()
        for stage in discovery.stages_for(profile, chapter):
            assert all(below.fingerprint in seen for below in stage.inputs.values())
            seen.add(stage.fingerprint)


def test_a_text_folder_that_is_not_there_is_said_before_any_work(tmp_path):
    content = yaml.safe_load((FOLDER / "smoke.yaml").read_text())
    content["text"] |= {"source": "folder", "folder": str(tmp_path / "missing")}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    stages = discovery.stages_for(load_profile(str(path)), "05_cross_lingual")
    with pytest.raises(UserError, match="does not exist"):
        discovery.text_is_in_reach(stages)


def test_text_that_cannot_be_fetched_is_said_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get anywhere
    stages = discovery.stages_for(load_profile("smoke"), "05_cross_lingual")
    assert next(stage for stage in stages if stage.kind == "text").early
    with pytest.raises(UserError, match=r"apt-get is not on this machine.*--without-real-text"):
        discovery.text_is_in_reach(stages)
    discovery.text_is_in_reach([stage for stage in stages if stage.kind != "text"])


def test_a_gpu_profile_without_a_gpu_is_refused_before_any_work():
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(UserError, match="cuda and torch finds no GPU"):
        discovery.device_is_there(discovery.stages_for(load_profile("gpu"), "01_worlds_and_models"))


@pytest.mark.parametrize("device, refused", [("cuda", False), ("cuda:1", False), ("cuda:2", True), ("cuda:01", True)])
def test_a_gpu_that_is_not_among_those_here_is_refused_in_one_line(monkeypatch, device, refused):
    monkeypatch.setattr(discovery, "gpus", lambda: ["cuda", "cuda:0", "cuda:1"])
    stages = [SimpleNamespace(parameters={"device": device}), SimpleNamespace(parameters={})]
    if refused:
        with pytest.raises(
            UserError, match=f"on {device} and torch finds cuda:0, cuda:1: change its `device`"
        ) as error:
            discovery.device_is_there(stages)
        assert "\n" not in str(error.value)
    else:
        discovery.device_is_there(stages)


def test_gpus_are_named_as_profiles_name_them(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.gpus() == ["cuda", "cuda:0", "cuda:1"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.gpus() == []


def test_parameters_of_a_notebook_reach_the_stages_that_take_them(monkeypatch):
    asked = []
    module = SimpleNamespace(reads=lambda profile, model="": asked.append(model) or [])
    monkeypatch.setattr(discovery, "finding", lambda chapter: module)
    for given in ({"model": "harbour", "k": 5}, {}, None):
        assert discovery.stages_for(load_profile("smoke"), "12_x", given) == []
    assert asked == ["harbour", "", ""]


def test_a_chapter_with_a_section_of_its_own_is_for_profiles_that_have_it(monkeypatch):
    sections = {"12_x": {"SECTION": "dialogue"}, "13_y": {"SECTION": "nowhere"}}
    monkeypatch.setattr(discovery, "chapter_names", lambda: ["00_w", "12_x", "13_y"])
    monkeypatch.setattr(discovery, "finding", lambda chapter: SimpleNamespace(**sections.get(chapter, {})))
    assert discovery.chapters_for(load_profile("smoke")) == ["00_w", "12_x"]
    assert discovery.chapters_for(load_profile("smoke", real_text=False)) == ["00_w"]


def test_every_chapter_has_a_notebook_and_every_notebook_a_grid():
    notebooks = {path.stem for path in (FOLDER.parents[2] / "notebooks").glob("*.ipynb")}
    assert notebooks == set(discovery.chapter_names())


def test_a_profile_may_leave_a_world_out(tmp_path):
    content = yaml.safe_load((FOLDER / "smoke.yaml").read_text())
    del content["cast"]
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    profile = load_profile(str(path))
    assert profile.cast is None and grid.planted_grid(profile, "cast") == []
    assert grid.planted_grid(profile, "atlas")
    with pytest.raises(UserError, match="no world is called 'map': choose one of atlas, "):
        grid.planted_grid(profile, "map")


@pytest.mark.parametrize("corpus", PLANTED)
def test_the_kinds_of_queries_that_a_profile_may_name_are_those_of_the_world(corpus):
    section, world = getattr(load_profile("smoke"), corpus), PLANTED[corpus]
    asked = world(**section.of_arm("base", 11) | ({"alone": 2} if world is Atlas else {}))
    made = sys.modules[world.__module__].build(asked)
    assert set(made.queries["kind"].to_pylist()) == set(QUERY_KINDS[world])


def test_arms_change_the_world_and_nothing_else():
    profile = load_profile("laptop")
    base, turned = (grid.planted_grid(profile, "atlas", [arm], (), [64], [11])[0] for arm in ("base", "both_orders"))
    assert turned.world.parameters == base.world.parameters | profile.atlas.arms["both_orders"].world
    assert turned.model.parameters == base.model.parameters and turned.influence == {}
    assert turned.model.fingerprint != base.model.fingerprint
    assert not grid.planted_grid(profile, "atlas", ["both_orders"], widths=[32])  # the arm has no such width
    assert not grid.planted_grid(profile, "atlas", ["no_such_arm"])


def test_a_model_is_trained_again_on_the_same_world_and_scanned_the_same_way():
    profile = load_profile("smoke")
    arms = on_one_world(profile)
    assert len(arms) > 1
    base, *others = (grid.planted_grid(profile, "atlas", [arm], (1.0, READ), [16], [11])[0] for arm in arms)
    for again in others:
        assert again.world.fingerprint == base.world.fingerprint and again.model.fingerprint != base.model.fingerprint
        assert again.seed == base.seed and again.model.parameters["recipe"]["seed"] != base.seed
        for at, scan in base.influence.items():
            assert again.influence[at].parameters == scan.parameters
            assert again.influence[at].fingerprint != scan.fingerprint


@pytest.mark.parametrize("name", profile_names())
def test_every_arm_of_every_world_has_a_stage_and_a_cost(name):
    profile = load_profile(name)
    for corpus in PLANTED:
        if (section := getattr(profile, corpus)) is None:
            continue
        found = grid.planted_grid(profile, corpus, ("base", *section.arms), seeds=[0])
        assert {trained.arm for trained in found} == {"base", *section.arms}
        for stage in (stage for trained in found for stage in trained.stages):
            assert stage.fingerprint and cost_of(stage).seconds > 0 and cost_of(stage).memory_bytes > 0


@pytest.mark.parametrize("corpus", PLANTED)
def test_costs_rest_on_the_size_that_a_world_has(corpus, tmp_path):
    stage = grid.planted_grid(load_profile("smoke"), corpus)[0].world
    stage.function(stage.parameters, {}, tmp_path, None)
    world, (sequences, length, words) = World.load(tmp_path), shape(stage)
    assert (sequences, length) == (world.sequences.num_rows, world.context)
    assert words == pytest.approx(world.vocabulary_size, rel=0.1)


def test_an_arm_may_replace_statements_of_a_world_as_it_stands():
    profile = load_profile("smoke")
    base, arm = (grid.planted_grid(profile, "atlas", [name], (), [32])[0] for name in ("base", "without_copies"))
    assert arm.world.inputs["world"].fingerprint == base.world.fingerprint
    assert shape(arm.world) == shape(base.world) and arm.model.parameters == base.model.parameters
    assert base.world.fingerprint in {stage.fingerprint for stage in arm.stages}


def test_sizes_may_have_an_architecture_of_their_own():
    profile = load_profile("smoke")
    family = profile.little_atlas.family
    sizes = tuple(family.sizes[0].model_copy(update={"architecture": each}) for each in ("", "llama"))
    little = profile.little_atlas.model_copy(update={"family": family.model_copy(update={"sizes": sizes})})
    neox, llama = grid.planted_grid(profile.model_copy(update={"little_atlas": little}), "little_atlas")
    assert [one.model.parameters["architecture"] for one in (neox, llama)] == ["gpt_neox", "llama"]
    assert neox.world.fingerprint == llama.world.fingerprint and "llama" in llama.model.label


def test_referees_know_how_the_model_was_trained_and_one_of_them_reads_a_scan():
    (one,) = grid.planted_grid(
        load_profile("smoke"), "little_atlas", extra=("rivals", "response", "bank", "reweighted")
    )
    for (kind, _), stage in one.extra.items():
        scan = {"influence"} if kind == "reweighted" else set()
        assert stage.parameters["model"] == one.model.parameters and set(stage.inputs) == {"world", "model"} | scan, (
            kind
        )


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        (
            "ladder",
            {"arms": {"less": {"without": "copies"}}},
            "less removes copies, which Atlas has and Ladder has not",
        ),
        ("atlas", {"arms": {"less": {"without": "words"}}}, "without"),
        ("little_atlas", {"family": {"sizes": [{"width": 16, "architecture": "rwkv"}]}}, "architecture='rwkv' must be"),
        ("little_atlas", {"extra": {"jury": {}}}, "no finding makes a stage 'jury'"),
    ],
)
def test_a_referee_section_that_cannot_be_is_refused(section, change, message, tmp_path):
    content = yaml.safe_load((FOLDER / "smoke.yaml").read_text())
    content[section] |= change
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message):
        load_profile(str(path))


@pytest.mark.parametrize("name", WHOLE)
def test_chapter_02_finds_its_rivals_in_every_profile(name):
    profile = load_profile(name)
    found = grid.planted_grid(profile, "atlas", widths=middle_width(profile), extra=("rivals",))
    assert found and all(("rivals", 1.0) in one.extra for one in found)
    asked = {at for one in found for at in one.extra["rivals", 1.0].parameters["tracin"]}
    assert asked <= {*profile_fractions(profile, "atlas"), 1.0}
    kinds = {"rivals", "inverses", "response", "refined", "bank", "reweighted"}
    for one in grid.planted_grid(profile, "little_atlas", extra=kinds):
        assert {kind for kind, _ in one.extra} == kinds
    for one in grid.text_grid(profile, extra=("rivals", "bank"), section="little_text"):
        assert {kind for kind, _ in one.extra} == {"rivals", "bank"}


@pytest.mark.parametrize("name", WHOLE)
def test_every_profile_trains_again_what_chapter_08_asks(name):
    profile = load_profile(name)
    widths = {one.size.width for one in grid.planted_grid(profile, "atlas", ("without_copies",), ())}
    assert max(size.width for size in profile.atlas.family.sizes) in widths


@pytest.mark.parametrize("name", WHOLE)
def test_every_profile_reads_spoken_lines(name):
    assert {one.arm for one in grid.dialogue_grid(load_profile(name), fractions=())} == {"base"}


@pytest.mark.parametrize("name", [name for name in profile_names() if load_profile(name).little_atlas])
def test_one_sequence_a_hundredth_and_a_tenth_are_left_out_as_chapters_02_and_03_say(name):
    little = load_profile(name).little_atlas
    documents = little.world["documents"]
    assert (
        little.extra["reweighted"]["counts"] == [1, documents // 100, documents // 10]
        and little.scan.sequences >= documents
    )


def profile_fractions(profile, world):
    return getattr(profile, world).scan.fractions


@pytest.mark.parametrize("name", WHOLE)
def test_every_profile_has_what_chapter_08_trains_again_and_its_absence_is_said(name, tmp_path):
    assert grid.planted_grid(load_profile(name), "atlas", ("without_copies",), ())
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    del content["atlas"]["arms"]["without_copies"]
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="no atlas arm `without_copies`"):
        discovery.stages_for(load_profile(str(path)), "08_memorisation")
