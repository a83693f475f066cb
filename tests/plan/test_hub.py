"""``ciuic plan`` of a repository on the hub: headers by range, weights never; and what goes wrong there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ciuic_hf.demo.published import CONFIGS, write_headers
from tests.plan.hub import serving

REPOSITORY = "deepseek-ai/DeepSeek-V2-Lite"
_SCRIPT = """
import contextlib, io, json, sys
from ciuic_hf.cli.main import main
results = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    results.append([status, out.getvalue(), " ".join(err.getvalue().split())])
print(json.dumps(results))
"""


def plan_all(commands: Sequence[list[str]], endpoint: str, home: Path) -> list[Any]:
    """Exit status, output and errors of each command, in one process that talks to this endpoint."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps([["plan", *command] for command in commands])],
        env=environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories: a good one, one with a file that lies, one without safetensors."""
    root = tmp_path_factory.mktemp("hub")
    write_headers(REPOSITORY, root / REPOSITORY)
    lying = write_headers(REPOSITORY, root / "someone/lying")
    file = next(iter(sorted(lying.glob("*.safetensors"))))
    with file.open("r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        header = handle.read(length)
        handle.seek(8)
        handle.write(header.replace(b"[102400, 2048]", b"[102400, 2049]", 1))
    (root / "someone/empty").mkdir()
    (root / "someone/empty/config.json").write_text(json.dumps(CONFIGS[REPOSITORY]))
    (root / "someone/nothing").mkdir()
    (root / "someone/gated").mkdir()
    return root


def test_headers_come_by_range_and_errors_are_sentences(root: Path, tmp_path: Path) -> None:
    cases = {
        "someone/lying": "model.embed_tokens.weight claims shape [102400, 2049] BF16 in 419,430,400 bytes",
        "someone/empty": "someone/empty has no safetensors files on the hub",
        "someone/nothing": "someone/nothing has no config.json on the hub",
        "someone/gated": "someone/gated is gated: accept its terms",
        "someone/absent": "someone/absent is neither a directory here nor a repository that the hub shows you",
    }
    good = [REPOSITORY, "--memory", "12GiB", "--context", "4096", "--json"]
    revision = [REPOSITORY, "--revision", "no-such"]
    with serving(root) as hub:
        hub.gated.add("someone/gated")
        results = plan_all([good, *([name] for name in cases), revision], hub.endpoint, tmp_path)
        sent = dict(hub.sent)
    status, out, err = results[0]
    assert status == 0, err
    found = json.loads(out)
    assert found["fits"] and found["files"]["nbytes"] == 2 * 15_706_484_224
    assert found["nbytes"] <= 12 << 30
    assert sum(sent.values()) < 4 << 20  # of 31 GB
    for (status, _, err), message in zip(results[1:-1], cases.values(), strict=True):
        assert (status, message in err) == (1, True), err
    assert "has no revision no-such on the hub" in results[-1][2]


def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    ((status, _, err),) = plan_all([["someone/model"]], "http://127.0.0.1:9", tmp_path)
    assert status == 1
    assert "someone/model is no directory here and the hub cannot be reached" in err
