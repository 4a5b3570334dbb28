"""A hub's models at one commit: what is fetched, and what is said where it cannot be."""

import json

import huggingface_hub
import pytest

from influence_kit import hub
from influence_kit.errors import UserError

COMMIT = "0123456789" * 4


@pytest.mark.parametrize("source", [f"gpt2@{COMMIT}", f"harbour/tiny-1.7B@{COMMIT}"])
def test_a_name_with_its_commit_is_taken(source):
    assert hub.is_pinned(source) and hub.hub_source(source) == source
    assert hub.short_name(source) == f"{source.partition('@')[0].rpartition('/')[2]}@0123456"


@pytest.mark.parametrize(
    "source",
    ["gpt2", "harbour/tiny", "harbour/tiny@main", f"harbour/tiny@{COMMIT[:-1]}", f"a/b/c@{COMMIT}", f"@{COMMIT}"],
)
def test_a_name_without_one_is_refused_in_one_line(source):
    assert not hub.is_pinned(source)
    with pytest.raises(UserError, match="names no commit.*@COMMIT with its 40 hexadecimal digits") as error:
        hub.hub_source(source)
    assert "\n" not in str(error.value)


def test_terms_of_its_own_have_to_be_accepted_by_name():
    with pytest.raises(UserError, match="give terms='Gemma Terms of Use' if you accept them"):
        hub.hub_source(f"google/gemma-3-270m@{COMMIT}")
    assert hub.hub_source(f"google/gemma-3-270m@{COMMIT}", "Gemma Terms of Use")


def test_what_is_fetched_is_what_was_asked_for_and_nothing_that_runs(tmp_path, monkeypatch):
    def give(name, revision, local_dir, allow_patterns, ignore_patterns):
        assert (name, revision, ignore_patterns) == ("harbour/tiny", COMMIT, "*/*")
        offered = ["config.json", "model.safetensors", "pytorch_model.bin", "modeling_tiny.py", "onnx/config.json"]
        taken = list(
            huggingface_hub.utils.filter_repo_objects(
                offered, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        assert taken == ["config.json", "model.safetensors"]
        (local_dir / ".cache" / "huggingface").mkdir(parents=True)
        for file in taken:
            (local_dir / file).write_text(json.dumps(file))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    hub.fetch(f"harbour/tiny@{COMMIT}", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_commit_without_safetensors_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **asked: None)
    with pytest.raises(UserError, match="no weights in safetensors at this commit"):
        hub.fetch(f"harbour/tiny@{COMMIT}", tmp_path)


def test_no_connection_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"could not be fetched: .*\(run on a machine with internet, or give the path"
    ) as error:
        hub.fetch(f"harbour/tiny@{COMMIT}", tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_says_how_many_weights_it_has_and_under_which_licence(tmp_path):
    import numpy
    from safetensors.numpy import save_file

    save_file(
        {"a": numpy.zeros((3, 4), numpy.float32), "b": numpy.zeros(5, numpy.float32)}, tmp_path / "one.safetensors"
    )
    save_file({"c": numpy.zeros((2, 2, 2), numpy.float16)}, tmp_path / "two.safetensors")
    assert hub.describe(tmp_path) == {"weights": 25, "types": ["F16", "F32"]}
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\n")
    assert hub.describe(tmp_path)["license"] == "apache-2.0"
