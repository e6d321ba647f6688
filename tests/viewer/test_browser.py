"""Viewer and gallery in a headless Chromium (make test-browser): JupyterLab, exact pixels, a phone.

Screenshots are left in build/browser for people to look at.
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
from trace_world import EGM, SMALL, draw_world, group_of, predictions_of, write_rows

from egm_lib.boxes import iou
from egm_lib.pipeline.playground import playground
from egm_lib.profile import load_profile
from egm_lib.reports.figures import build_figures
from egm_lib.reports.gallery import build_gallery
from egm_lib.reports.tables import build_tables
from egm_lib.run import Run
from egm_lib.viewer.comparison import Comparison, compare, rows_of
from egm_lib.viewer.page import steps_of
from egm_lib.viewer.palette import style_of

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "build" / "browser"


def drive(job: dict) -> dict:
    chromium = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    )
    if not chromium or not shutil.which("node"):
        pytest.skip("needs node and a Chromium (CHROMIUM=path)")
    if (
        not os.environ.get("PLAYWRIGHT_CORE")
        and not (ROOT / "node_modules" / "playwright-core").is_dir()
    ):
        pytest.skip(
            "needs playwright-core: npm install --no-save playwright-core, or PLAYWRIGHT_CORE=its "
            "folder"
        )
    out = SHOTS / job["name"]
    out.mkdir(parents=True, exist_ok=True)
    command = [
        "node",
        str(Path(__file__).with_name("browser") / "drive.mjs"),
        json.dumps(job | {"out": str(out)}),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=2400,
        env=os.environ | {"CHROMIUM": chromium},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert "failed" not in seen, (
        f"{seen['failed']} (console: {seen['errors']}; see {out / 'failed.png'})"
    )
    return seen


def test_gallery_opens_from_disk_pages_and_fits_a_phone(tmp_path):
    run, figures = write_run(tmp_path / "runs", tmp_path / "world"), tmp_path / "figures"
    build_tables([run], figures, draws=50)
    build_figures([run], figures, root=tmp_path / "world")
    page = build_gallery([run], figures, tmp_path / "gallery.html", root=tmp_path / "world")
    seen = drive({"what": "gallery", "name": "gallery", "url": page.as_uri()})
    assert seen["errors"] == []
    assert set(seen["requests"]) == {page.as_uri()}  # nothing fetched but the page
    for width in ("desktop", "phone"):
        assert seen[width]["paged"] and seen[width]["returned"] and seen[width]["chosen"] == "true"
        assert seen[width]["overflow_px"] <= 0
        judge_steps(seen[width]["expression"], seen[width]["steps"], predictions_of_run(run))


def predictions_of_run(run: Path) -> list[Comparison]:
    return compare(rows_of([run / "predictions" / model for model in (SMALL, EGM)]))


def judge_steps(expression: str, seen: dict, comparisons: list[Comparison]) -> None:
    """Marks lie where the library found places; words and marks light each other; keys reveal."""
    rows = [
        sample.answers[EGM].row
        for sample in comparisons
        if sample.sample["expression"] in expression
    ]
    found = [{f"{EGM}/{n}": step.point for n, step in enumerate(steps_of(row), 1)} for row in rows]
    assert any(
        seen["marks"].keys() == points.keys()
        and all(seen["marks"][name] == pytest.approx(points[name], abs=0.7) for name in points)
        for points in found
    ), (seen["marks"], found)
    assert seen["lit_by_word"] == [seen["last"]] and seen["lit_by_mark"] == [seen["last"]]
    count = len(seen["marks"])
    assert (seen["all"], seen["one_back"], seen["again"], seen["none"]) == (
        count,
        count - 1,
        count,
        0,
    )
    assert seen["slider"] == f"{count - 1} of {count}"


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab that serves tmp_path; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        f"--port={port}",
        "--ip=127.0.0.1",
        "--no-browser",
        "--allow-root",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={tmp_path}",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
        "--LabApp.expose_app_in_browser=True",
    ]
    settings = {
        "JUPYTER_CONFIG_DIR": tmp_path / "c",
        "JUPYTERLAB_SETTINGS_DIR": tmp_path / "s",
        "JUPYTERLAB_WORKSPACES_DIR": tmp_path / "w",
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
    }
    env = os.environ | {name: str(value) for name, value in settings.items()}
    news = (
        tmp_path / "s" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    )
    news.parent.mkdir(parents=True)
    # Else a dialog covers the corner of the page
    news.write_text('{"fetchNews": "false"}', encoding="utf-8")
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=env, stdout=log, stderr=log
        )
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
    write_rows(tmp_path / "rows.jsonl", predictions_of(samples))
    write_rows(tmp_path / "groups.jsonl", [group_of(sample) for sample in samples])
    code = (
        "from egm_lib.viewer import TraceViewer\nfrom egm_lib.files import read_jsonl\n"
        "TraceViewer('rows.jsonl', root='world', groups=read_jsonl('groups.jsonl'))"
    )
    notebook_of(tmp_path / "look.ipynb", code)
    seen = look_at_viewer(
        "lab", f"{lab}/look.ipynb", compare(rows_of(tmp_path / "rows.jsonl")), groups=True
    )
    assert seen["tiles"] == 16 and "advantage" in seen["tile_text"]


def test_viewer_of_notebook_07_in_jupyterlab(project, lab):
    run = Run(load_profile("smoke"), 0)
    comparisons = compare(rows_of([run.root / "predictions" / model for model in (SMALL, EGM)]))
    seen = look_at_viewer("notebook-07", f"{lab}/notebooks/07_evaluation.ipynb", comparisons)
    gained = sum(sample.failed(SMALL) and sample.solved(EGM) for sample in comparisons)
    # As the notebook sets the filter
    assert seen["opened"]["of"] == f"of {gained} (all: {len(comparisons)})"


def test_playground_in_jupyterlab(lab, tmp_path):
    """The round trip with the miniature: typed, answered, edited, dragged, and a file opened."""
    samples = playground(Run(load_profile("mini"), 0))._samples
    place_in_list, sample = 3, samples[3]  # "green star closest to the triangle"
    scene, target = sample["scene"], sample["gt_box"]
    number = next(
        number
        for number, thing in enumerate(scene.things)
        if list(thing.visible_box_px or ()) == target
    )
    name = scene.objects[number][0]
    other = max(scene.things, key=lambda thing: abs(thing.centre_px[0] - target[0]))
    place = " ".join(str(20 * round(side / 128 * 50)) for side in other.centre_px)
    bad, own = tmp_path / "notes.png", tmp_path / "mine.png"
    bad.write_text("no image")
    scene.image().resize((256, 256)).save(own)
    code = (
        "import egm_lib.viewer.playground\n"
        "from egm_lib.pipeline.playground import playground\n"
        "from egm_lib.run import open_run\n"
        "egm_lib.viewer.playground.REFRESH_S = 0  # every token, however fast the machine is\n"
        f"page = playground(open_run('mini', 0), models=['reference'])\n"
        f"page.show_sample({place_in_list})\npage"
    )
    notebook_of(tmp_path / "play.ipynb", code)
    by_px = [96 - target[0], 0]
    seen = drive(
        {
            "what": "playground",
            "name": "playground",
            "url": f"{lab}/play.ipynb",
            "expression": sample["expression"],
            "edited": f"the triangle is at 140 780. the {name} nearest to it is at {place}.",
            "drag": number,
            "by_px": by_px,
            "file": str(own),
            "bad_file": str(bad),
        }
    )
    assert seen["errors"] == []
    asked, answers = seen["asked"], {}
    for look in ("asked", "without", "edited", "dragged", "own"):
        answers[look] = {
            model: box for model, box in seen[look]["boxes"].items() if model != "ground truth"
        }
    assert iou(answers["asked"]["reference"], target) > 0.5
    assert len(asked["marks"]) > 0 and "hit" in asked["cards"][0]["verdict"]
    assert "first token after" in asked["cards"][0]["facts"]
    # It arrived bit by bit: the trace grew while it was written, with its steps
    lengths = [length for verdict, length, _ in seen["written"] if verdict == "still writing"]
    assert len(set(lengths)) > 2 and lengths == sorted(lengths)
    assert seen["without"]["cards"][1]["reasoning"].startswith("(answers without reasoning)")
    edited = answers["edited"]["reference, edited"]
    assert iou(edited, other.visible_box_px) > 0.5 > iou(edited, target)
    assert seen["asked"]["things"] == len(scene.things)
    # The dragged object is drawn where it was put, and the question is answered anew
    assert len(seen["dragged"]["cards"]) == 1 and "reference" in answers["dragged"]
    assert "hit" not in seen["dragged"]["cards"][0]["verdict"]
    moved = scene.moved(number, by_px)
    assert seen["keyed"] == pytest.approx(moved.things[number].full_box_px[0] - 4, abs=2)
    assert "notes.png: not a readable image" in seen["bad_file"]
    assert "reference" in answers["own"] and seen["own"]["things"] == 0
    assert seen["phone_overflow_px"] <= 0


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the project with a finished smoke run, so that the run stays as it is."""
    run = Run(load_profile("smoke"), 0)
    if not run.predictions("small-egm", "coco_amodal_test").is_file():
        pytest.skip("needs a run of the smoke profile: make reproduce PROFILE=smoke")
    data = ("data/mini", "data/paper", run.profile.data.root, run.root.relative_to(ROOT))
    for folder in ("egm_lib", "notebooks", *data):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for path in (tmp_path / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if "parameters" in cell.metadata.get("tags", []):
                cell.source = cell.source.replace('"mini"', '"smoke"')
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, path)
    return tmp_path


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")))
def test_every_notebook_of_a_finished_smoke_run_in_jupyterlab(name, project, lab):
    """All cells run in the browser, without an error of its console, and no figure is empty."""
    url = f"{lab}/notebooks/{name}.ipynb"
    seen = drive({"what": "notebook", "name": name, "url": url, "timeout_ms": 900_000})
    assert seen["errors"] == []
    for figure in seen["figures"]:
        assert figure["shown"] > 100 and figure["colours"] > 20, figure
    assert seen["text"], "no cell has an output"


def notebook_of(path: Path, code: str) -> None:
    """Writes a notebook of one cell."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    notebook.metadata.kernelspec = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(notebook, path)


def look_at_viewer(
    name: str, url: str, comparisons: list[Comparison], groups: bool = False
) -> dict:
    """Drives the viewer of the notebook at url, and compares the page with the rows."""
    shows = {
        "B solves what A misses": lambda sample: sample.failed(SMALL) and sample.solved(EGM),
        "A solves": lambda sample: sample.solved(SMALL),
        "A misses": lambda sample: sample.failed(SMALL),
    }
    left = {show: list(filter(accepted, comparisons)) for show, accepted in shows.items()}
    show, place = next(
        (show, place)
        for show, samples in left.items()
        if 1 < len(samples) < len(comparisons)
        for place, sample in enumerate(samples)
        if measurable(sample)
    )
    chosen, word = left[show][place], comparisons[-1].sample["expression"].split()[0]
    found = sum(word in sample.sample["expression"] for sample in comparisons)
    seen = drive(
        {
            "what": "lab",
            "name": name,
            "url": url,
            "timeout_ms": 600_000,
            "groups": groups,
            "total": len(comparisons),
            "show": show,
            "show_count": len(left[show]),
            "place": place,
            "sample_id": chosen.sample["sample_id"],
            "search": word,
            "search_count": found,
        }
    )
    assert seen["errors"] == []  # of the console
    steps = {"last": comparisons[-1], "jumped": chosen} | dict(
        zip(("first", "next", "key"), comparisons, strict=False)
    )
    for step, each in steps.items():
        boxes = {model: answer.box for model, answer in each.answers.items() if answer.box}
        # On the screen are the boxes of the rows, in their pixels
        boxes["ground truth"] = each.sample["gt_box"]
        shown = {box: xyxy for box, xyxy in seen[step]["boxes"].items() if box != "modal"}
        assert shown.keys() == boxes.keys()
        for box, xyxy in boxes.items():
            assert shown[box] == pytest.approx(xyxy, abs=0.6), (step, box)
        assert each.sample["expression"] in seen[step]["side"]
    assert seen["focus_kept"] and seen["search_keeps_focus"]
    assert seen["lit"] == [EGM] and EGM not in seen["hidden"] and SMALL in seen["hidden"]
    assert seen["saved_as"] == [f"{chosen.sample['sample_id']}.{kind}" for kind in ("png", "svg")]
    assert_export_has_boxes(SHOTS / name / "export.png", chosen)
    assert "<svg" in (SHOTS / name / "export.svg").read_text(encoding="utf-8")
    return seen


def measurable(each: Comparison) -> bool:
    """Both models' boxes lie well inside the image and apart: their strokes can be measured."""
    boxes = [each.answers[model].box for model in (SMALL, EGM)]
    right, bottom = each.sample["width"] - 4, each.sample["height"] - 4
    inside = (
        box and min(box) > 4 and box[2] < right and box[3] < bottom
        for box in [*boxes, each.sample["gt_box"]]
    )
    return all(inside) and iou(*boxes) == 0


def assert_export_has_boxes(path: Path, each: Comparison) -> None:
    """In the PNG export, each box has a stroke along its four sides, and outside them."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    pixels = pixels[:, : int(pixels.shape[1] * 0.44)]  # the image; the text is at its right
    drawn = (pixels.sum(axis=2) < 3 * 255).any(axis=1)
    # A GRPO group may stand below
    pixels = pixels[drawn.argmax() :][: drawn[drawn.argmax() :].argmin() or None]

    def extent(found: np.ndarray) -> tuple[int, int, int, int]:
        ys, xs = np.nonzero(found)
        return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1

    left, top, right, _ = extent(pixels.sum(axis=2) < 3 * 255)
    scale = (right - left) / each.sample["width"]
    rows, columns = np.indices(pixels.shape[:2])
    x_HW, y_HW = (columns + 0.5 - left) / scale, (rows + 0.5 - top) / scale
    for model in (SMALL, EGM):
        x1, y1, x2, y2 = each.answers[model].box
        has_colour = abs(pixels - ImageColor.getrgb(style_of(model).colour)).sum(axis=2) < 25
        beside, between = (y_HW > y1) & (y_HW < y2), (x_HW > x1) & (x_HW < x2)
        # (side, how far outside of it a pixel lies, pixels along it). Steps of the trace have the
        # model's colour too: a stroke covers much of a side, where their line crosses it once.
        for side, out_HW, along in (
            ("left", x1 - x_HW, beside),
            ("right", x_HW - x2, beside),
            ("top", y1 - y_HW, between),
            ("bottom", y_HW - y2, between),
        ):
            covered = [
                (has_colour & along & (out_HW > start) & (out_HW <= start + 0.5)).sum() * 0.5
                for start in np.arange(-2, 3, 0.5)
            ]
            length = scale * ((y2 - y1) if along is beside else (x2 - x1))
            strong = [place for place, count in enumerate(covered) if count > 0.15 * length]
            assert strong and min(strong) >= 3, (model, side, covered)  # from 0.5 px inside on
