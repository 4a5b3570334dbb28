"""JupyterLab as `run_all.sh lab` opens it: its kernel, what a cell shows while a stage is made, and what an interrupt costs."""

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from influence_kit.publishing.lab import command
from tests.runner.tiny_stages import STEPS, calls

REPOSITORY = Path(__file__).parents[2]
SLOW = "from influence_kit.runner.stages import ensure\nfrom tests.runner.tiny_stages import stage\nfolder = ensure(stage('slow'))"


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel as JupyterLab starts it: by the name that the notebooks ask for, in their folder."""
    from jupyter_client.manager import start_new_kernel

    for name, value in (command()[1] | {"JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}).items():
        monkeypatch.setenv(name, value)
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(REPOSITORY / "notebooks"))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run_cell(client, source: str, each=lambda shown: None) -> tuple[str, list[str]]:
    """A cell's status, and every text that it showed or put in the place of one; `each` sees them as they come."""
    asked, shown = client.execute(source), []
    while True:
        message = client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") != asked:
            continue
        content = message["content"]
        if message["msg_type"] in ("display_data", "update_display_data"):
            shown.append(content["data"]["text/plain"])
            each(shown)
        elif message["msg_type"] == "stream":
            shown.append(content["text"])
        elif message["msg_type"] == "status" and content["execution_state"] == "idle":
            break
    while (reply := client.get_shell_msg(timeout=60))["parent_header"].get("msg_id") != asked:
        pass
    return reply["content"].get("ename", reply["content"]["status"]), shown


def test_a_cell_shows_how_far_its_stages_are_and_an_interrupt_loses_nothing(kernel):
    manager, client = kernel
    status, shown = run_cell(
        client, "import os, sys; print(os.getcwd(), sys.prefix, os.environ['INFLUENCE_KIT_CACHE'])"
    )
    assert status == "ok" and shown[0].split()[0] == str(REPOSITORY)
    assert shown[0].split()[2] == os.environ["INFLUENCE_KIT_CACHE"]

    def interrupt_at_half(shown):
        if len(shown) == 3:
            manager.interrupt_kernel()

    status, shown = run_cell(client, SLOW, interrupt_at_half)
    assert status == "KeyboardInterrupt" and shown[0].startswith("making slow ") and "% links 0:0" in shown[2]
    assert shown[-1].startswith("interrupted at slow ") and "goes on from where it saved itself" in shown[-1]
    status, shown = run_cell(client, SLOW)
    assert status == "ok" and shown[-1].startswith("1 stage made in 0:0")
    first, second = (int(call.split()[-1]) for call in calls())
    assert first == 0 < second < STEPS
    assert run_cell(client, SLOW) == ("ok", [])  # from the cache


def test_a_kernel_of_a_run_shows_nothing_that_differs_between_machines(kernel, monkeypatch):
    status, shown = run_cell(kernel[1], f"import os\nos.environ['INFLUENCE_KIT_QUIET'] = '1'\n{SLOW}")
    assert status == "ok" and shown == []


@pytest.mark.slow
def test_the_server_has_the_notebooks_and_this_kernel(tmp_path):
    words, settings = command("03_heavy_tails", ["--no-browser", "--ServerApp.token=word", "--ServerApp.port=0"])
    environment = os.environ | settings | {"JUPYTER_RUNTIME_DIR": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path)}
    server = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (about := list(tmp_path.glob("jpserver-*.json"))):
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.1)

        def get(place: str) -> dict:
            url = f"{json.loads(about[0].read_text())['url']}api/{place}?token=word"
            while True:  # the file about a server is there a moment before the server listens
                try:
                    return json.loads(urllib.request.urlopen(url, timeout=30).read())
                except urllib.error.URLError:
                    assert time.monotonic() < deadline and server.poll() is None
                    time.sleep(0.1)

        assert "03_heavy_tails.ipynb" in {entry["name"] for entry in get("contents/notebooks")["content"]}
        kernels = get("kernelspecs")
        assert kernels["default"] == "python3" and kernels["kernelspecs"]["python3"]["spec"]["argv"][0] == words[0]
    finally:
        server.terminate()
        server.wait(timeout=30)
