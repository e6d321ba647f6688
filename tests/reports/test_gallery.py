"""The gallery: one file that fetches nothing, holds traces of every kind, and names the gaps."""

import json
import re

import pytest
from toy_run import write_run

from egm_lib.errors import InputError
from egm_lib.reports.figures import build_figures
from egm_lib.reports.gallery import TRACES_A_KIND, build_gallery
from egm_lib.reports.tables import build_tables


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    run, figures = write_run(folder / "runs", folder / "world"), folder / "figures"
    build_tables([run], figures, draws=50, only=["table4"])
    build_figures([run], figures, root=folder / "world", only=["fig2"])
    return build_gallery([run], figures, folder / "gallery.html", root=folder / "world").read_text(
        encoding="utf-8"
    )


def traces(page: str) -> dict:
    return json.loads(
        re.search(r'<script type="application/json" id="traces">(.*?)</script>', page, re.DOTALL)[1]
    )


def test_the_page_fetches_nothing(page):
    addresses = re.findall(
        r"""(?:src|href)\s*=\s*["']([^"']*)["']|url\(([^)]*)\)|@import|fetch\(|import\(""", page
    )
    outside = [a or b for a, b in addresses if not (a or b).startswith(("data:", "#", "`#", "$"))]
    assert outside == [] and "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_the_page_has_traces_of_every_kind_with_their_images(page):
    kinds, images = traces(page)["kinds"], traces(page)["images"]
    assert len(set(images)) == len(images)  # each once, however many traces show it
    assert {"EGM solves what the base misses", "both solve"} <= {kind["kind"] for kind in kinds}
    assert {kind["task"] for kind in kinds} == {"vanilla", "amodal"}
    for kind in kinds:
        assert 0 < len(kind["views"]) <= min(TRACES_A_KIND, kind["of"])
        for view in kind["views"]:
            assert view["error"] is None and images[view["image"]].startswith("data:image/")
            base, egm = view["models"][0], view["models"][1]
            assert (egm["success"] and not base["success"]) == (
                kind["kind"] == "EGM solves what the base misses"
            )


def test_tables_are_there_and_missing_ones_are_not_run(page):
    assert "<summary>Table 4" in page and '<td class="not-run">not run</td>' in page
    assert "table5: not run" in page and "Summary: not run" in page


def test_text_of_a_model_cannot_end_the_script(tmp_path):
    run = write_run(tmp_path / "runs", tmp_path / "world", count=6)
    for file in (run / "predictions").rglob("*.jsonl"):
        file.write_text(
            file.read_text().replace("There are three", "</script><script>alert(1)</script>")
        )
    page = build_gallery([run], tmp_path, tmp_path / "g.html", root=tmp_path / "world").read_text()
    assert "alert(1)" in page and "<script>alert" not in page
    assert any(
        "</script>" in "".join(text for text, _ in model["reasoning"])
        for kind in traces(page)["kinds"]
        for view in kind["views"]
        for model in view["models"]
    )


@pytest.mark.parametrize("odd", ['[{"name": "fig2"}]', "[1]", "{}", '[["name"]]'])
def test_a_list_of_figures_of_another_shape_is_one_sentence(tmp_path, odd):
    (tmp_path / "toy-0").mkdir()
    (tmp_path / "figures.json").write_text(odd)
    with pytest.raises(InputError, match=r"figures.json .*draw the figures again"):
        build_gallery([tmp_path / "toy-0"], tmp_path, tmp_path / "g.html", root=tmp_path)
    assert not (tmp_path / "g.html").exists()
