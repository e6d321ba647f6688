"""Viewer and gallery in a real headless Chromium (make test-browser): JupyterLab, boxes at the right pixels, a phone.

Screenshots are left in build/browser to be looked at.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image, ImageColor
from toy_run import write_run
from trace_world import BACKGROUND, EGM, SMALL, draw_world, group_of, predictions_of, write_rows

from egm_lib.figures import build_figures
from egm_lib.gallery import build_gallery
from egm_lib.palette import look
from egm_lib.tables import build_tables

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[1]
SHOTS = ROOT / "build" / "browser"


def drive(job: dict) -> dict:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium or not shutil.which("node"):
        pytest.skip("needs node and a Chromium (CHROMIUM=path)")
    if not os.environ.get("PLAYWRIGHT_CORE") and not (ROOT / "node_modules" / "playwright-core").is_dir():
        pytest.skip("needs playwright-core: npm install --no-save playwright-core, or PLAYWRIGHT_CORE=its folder")
    out = SHOTS / job["what"]
    out.mkdir(parents=True, exist_ok=True)
    command = ["node", str(ROOT / "tests" / "browser" / "drive.mjs"), json.dumps(job | {"out": str(out)})]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env=os.environ | {"CHROMIUM": chromium}, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert "failed" not in seen, f"{seen['failed']} (console: {seen['errors']}; see {out / 'failed.png'})"
    return seen


def test_gallery_opens_from_disk_pages_and_fits_a_phone(tmp_path):
    run, figures = write_run(tmp_path / "runs", tmp_path / "world"), tmp_path / "figures"
    build_tables([run], figures, draws=50)
    build_figures([run], figures, root=tmp_path / "world")
    page = build_gallery([run], figures, tmp_path / "gallery.html", root=tmp_path / "world")
    seen = drive({"what": "gallery", "url": page.as_uri()})
    assert seen["errors"] == []
    assert set(seen["requests"]) == {page.as_uri()}  # nothing fetched but the page
    for width in ("desktop", "phone"):
        assert seen[width]["paged"] and seen[width]["returned"] and seen[width]["chosen"] == "true"
        assert seen[width]["overflow_px"] <= 0


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab that serves tmp_path; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--port={port}", "--ip=127.0.0.1", "--no-browser", "--allow-root", "--IdentityProvider.token=",
               f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=", "--LabApp.check_for_updates_class="
               "jupyterlab.NeverCheckForUpdate"]  # fmt: skip
    settings = {"JUPYTER_CONFIG_DIR": tmp_path / "c", "JUPYTERLAB_SETTINGS_DIR": tmp_path / "s",
                "JUPYTERLAB_WORKSPACES_DIR": tmp_path / "w", "PYTHONPATH": ROOT}  # fmt: skip
    env = os.environ | {name: str(value) for name, value in settings.items()}
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log)
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5).close()
                    break
                except OSError:
                    assert server.poll() is None, (tmp_path / "lab.log").read_text()
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/lab/tree"
        finally:
            server.terminate()
            server.wait(30)


def test_viewer_in_jupyterlab(lab, tmp_path):
    samples = draw_world(tmp_path / "world")
    rows = predictions_of(samples)
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "groups.jsonl", [group_of(sample) for sample in samples])
    code = (
        "from egm_lib.viewer import TraceViewer\nfrom egm_lib.evaluation import read_rows\n"
        "TraceViewer('rows.jsonl', root='world', groups=read_rows('groups.jsonl'))"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "look.ipynb")
    word = samples[-1]["expression"].split()[0]
    found = [s for s in samples if word in s["expression"] and s["boxes_all"][0] != s["gt_box"]]
    job = {"what": "lab", "url": f"{lab}/look.ipynb", "search": word, "search_count": len(found), "timeout_ms": 300_000}
    seen = drive(job)
    assert [error for error in seen["errors"] if "egm" in error.lower() or "widget" in error.lower()] == []
    for place, step in enumerate(("first", "next", "key")):  # boxes on the screen are those of the rows
        assert seen[step]["boxes"][SMALL] == pytest.approx(samples[place]["boxes_all"][0], abs=0.6)
        assert seen[step]["boxes"][EGM] == pytest.approx(samples[place]["gt_box"], abs=0.6)
        assert seen[step]["boxes"]["ground truth"] == pytest.approx(samples[place]["gt_box"], abs=0.6)
        assert samples[place]["expression"] in seen[step]["side"]
    missed = [sample for sample in samples if sample["boxes_all"][0] != sample["gt_box"]]
    assert seen["filtered"]["of"] == f"of {len(missed)} (all: {len(samples)})"
    assert seen["focus_kept"] and seen["search_keeps_focus"]
    assert seen["lit"] == [EGM] and EGM not in seen["hidden"]
    assert seen["tiles"] == 16 and "advantage" in seen["tile_text"]
    shown = next(s for s in samples if seen["saved_as"] == f"{s['sample_id']}.png")
    assert_export_has_boxes(SHOTS / "lab" / "export.png", shown)


def assert_export_has_boxes(path: Path, sample: dict) -> None:
    """In the PNG export, each box's colour has its middle where the row says, measured from the picture's corner."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    pixels = pixels[:, : int(pixels.shape[1] * 0.44)]  # the picture; the text is at its right

    def extent(colour: tuple[int, ...]) -> tuple[int, int, int, int]:
        ys, xs = np.nonzero(abs(pixels - colour).sum(axis=2) < 25)
        return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1

    left, top, right, _ = extent(BACKGROUND)
    scale = (right - left) / sample["width"]
    for model, (x1, y1, x2, y2) in ((SMALL, sample["boxes_all"][0]), (EGM, sample["gt_box"])):
        at = extent(ImageColor.getrgb(look(model).colour))
        middle = ((at[0] + at[2]) / 2 - left) / scale, ((at[1] + at[3]) / 2 - top) / scale
        assert middle == pytest.approx(((x1 + x2) / 2, (y1 + y2) / 2), abs=1), model
