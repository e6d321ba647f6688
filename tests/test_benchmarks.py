"""What runs all benchmarks."""

import runpy

from egm_lib.files import project_root


def test_a_benchmark_that_fails_does_not_end_the_others(tmp_path, monkeypatch, capfd):
    script = runpy.run_path(str(project_root() / "benchmarks" / "all.py"))
    assert {"parsing", "training"} <= set(script["SCRIPTS"])
    assert not {"latency_scale", "real_size"} & set(script["SCRIPTS"])  # hours; a GPU
    bad, good = tmp_path / "bad.py", tmp_path / "good.py"
    bad.write_text("raise SystemExit(3)")
    good.write_text("import sys; print('12 a second'); print('beside', file=sys.stderr)")
    inside = script["main"].__globals__
    monkeypatch.setitem(inside, "SCRIPTS", {"bad": bad, "good": good})
    monkeypatch.setitem(inside, "project_root", lambda: tmp_path)
    monkeypatch.setattr("sys.argv", ["all.py"])
    assert script["main"]() == 1
    out = tmp_path / "data" / "bench"
    table = (out / "summary.md").read_text()
    assert "| bad | 3 |" in table and "| good | 0 |" in table
    assert {"12 a second", "beside"} == set((out / "good.txt").read_text().splitlines())
    assert table in capfd.readouterr().out

    monkeypatch.setattr("sys.argv", ["all.py", "good"])
    assert script["main"]() == 0
    assert "bad" not in (out / "summary.md").read_text()
