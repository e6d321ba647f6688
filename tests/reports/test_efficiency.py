"""Tables and figures of efficiency: they say what the library computed, and what was not run."""

import pytest

from egm_lib.errors import InputError
from egm_lib.evaluation.latency_protocols import PROTOCOLS, published_ms
from egm_lib.evaluation.roofline import DEVICES, RooflineError
from egm_lib.reports.efficiency import FIGURES, TABLES, build_efficiency, tables
from egm_lib.reports.efficiency.__main__ import main
from egm_lib.reports.tables.cells import to_markdown

L20, THOR = DEVICES["L20"], DEVICES["Jetson-Thor"]
RECORD = {
    "machine": {
        "device": "cpu",
        "name": "a CPU",
        "time": "CPU time of one thread",
        "torch": "2",
        "transformers": "5",
    },
    "image_wh": [640, 480],
    "prompt_tokens": 30,
    "load": [0.1, 2.0],
    "probes": [
        {name: {"gbs": 10.0, "gflops": {"1": 5, "320": 80}} for name in ("float32", "bfloat16")}
    ],
    "rows": [
        {
            "model": "Qwen3-VL-4B",
            "dtype": "float32",
            "requests": 1,
            "answers": [42, 101],
            "share": 4,
            "layers": 9,
            "depth": 6,
            "vision_ms": 2000.0,
            "prefill_ms": 5000.0,
            "first_token_ms": 7500.0,
            "token_ms": 500.0,
            "total_ms": {"42": 28000.0, "101": 57500.0},
        },
        {
            "model": "Qwen3-VL-8B",
            "dtype": "float32",
            "requests": 64,
            "answers": [42, 101],
            "share": 1,
            "not_run": "35.1 GB of weights, 10 GB of room",
        },
    ],
}


@pytest.fixture
def records(monkeypatch):
    monkeypatch.setattr(tables, "records", lambda: [RECORD])


def test_every_model_of_fig_5_has_a_row_with_the_published_number():
    table = tables.latencies(L20)
    assert {row.label: row.cells[0].value for row in table.rows} == published_ms()
    assert all(len(row.cells) == len(table.columns) for row in table.rows)
    stated = [row.label for row in table.rows if "assumed" not in str(row.cells[1])]
    assert "EGM-Qwen3-VL-8B" in stated and "EGM-Qwen3-VL-2B" not in stated


def test_every_protocol_has_a_row_beside_the_published_ratio():
    table = tables.protocols(L20)
    assert [row.label for row in table.rows] == ["published", *(p.name for p in PROTOCOLS)]
    assert table.rows[0].cells[-1].value == pytest.approx(4320 / 737)


def test_a_cut_model_says_so_and_a_case_that_was_not_run_too(records):
    text = to_markdown(tables.measured(L20), "")
    assert "Qwen3-VL-4B, 9 of 36 layers, float32" in text
    assert "| Qwen3-VL-8B, float32, 101 tokens | ours | 64 | not run | not run |" in text
    assert "not run: 35.1 GB of weights" in text and "load of the machine 0.1 to 2" in text


def test_own_measurements_stand_among_the_groups(records):
    rows = {row.label: row.cells for row in tables.roofline(L20).rows}
    assert str(rows["decoding, a CPU, one request, fitted"][0]) == "1"
    assert rows["decoding, a CPU, several requests"] == [None] * 4
    assert len(tables.points(L20).rows) == 41 + 3


def test_what_a_device_does_not_hold_is_said():
    rows = {row.label: row.cells for row in tables.planner(THOR).rows}
    assert rows["EGM-Qwen3-VL-8B"][4:7] == [
        "InternVL-3-78B",
        rows["EGM-Qwen3-VL-8B"][5],
        "does not fit",
    ]
    figure, caption = FIGURES["planner"](THOR)
    assert "Too large for the device" in caption and "InternVL-3-78B" in caption


def test_everything_is_written_and_twice_the_same(records, tmp_path):
    first = build_efficiency(tmp_path / "one")
    assert set(first) == {*TABLES, *FIGURES}
    assert all(path.is_file() for paths in first.values() for path in paths)
    for path in build_efficiency(tmp_path / "two", only=["roofline"])["roofline"]:
        assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes(), path.name


def test_unknown_names_are_refused_in_a_sentence(tmp_path, capsys):
    with pytest.raises(InputError, match="planner"):
        build_efficiency(tmp_path, only=["fig99"])
    with pytest.raises(RooflineError, match="L20"):
        build_efficiency(tmp_path, gpu="L21", only=["planner"])
    assert main(["--gpu", "L21"]) == 2
    assert "L21" in capsys.readouterr().err


def test_the_figure_shows_every_device_that_was_measured():
    figure, _ = FIGURES["roofline"](DEVICES["L20"])
    [legend] = figure.legends
    shown = " ".join(text.get_text() for text in legend.get_texts())
    for record in tables.records():
        assert f"prompt and image, ours, {record['machine']['name']}" in shown
