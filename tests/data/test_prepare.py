"""From published files to a data root, and the four verbs of `python -m egm_lib.data`."""

import json

import numpy as np
import pytest
from PIL import Image
from real_formats import (
    annotation,
    coco_image,
    ref,
    region,
    rle,
    tao,
    write_coco_amodal,
    write_refcoco,
    write_tao,
)

from egm_lib.data import (
    AMODAL_SPLITS,
    EVAL_SPLITS,
    load_refcoco,
    open_image,
    read_eval,
    read_samples,
    read_train,
    resolve_image,
)
from egm_lib.data.__main__ import main
from egm_lib.data.leakage import remove_leakage
from egm_lib.data.prepare import prepare
from egm_lib.data.records import rows_to_dataset
from egm_lib.data.survey import describe, image_faults


def run(verb, root, *options):
    return main([verb, "--root", str(root), *options])


@pytest.fixture
def refcoco_root(tmp_path):
    """Images 1..9; all three sets train on 1 and 2. Image 2 leaks: RefCOCO+ alone tests on it."""
    for dataset, split_by, tested in (
        ("refcoco", "unc", 3),
        ("refcoco+", "unc", 2),
        ("refcocog", "umd", 5),
    ):
        splits = [split for name, split in EVAL_SPLITS if name == dataset]
        refs = [ref(1, image_id=1, sents=("left man", "man that left")), ref(2, image_id=2)]
        refs += [ref(10 + i, split, image_id=tested + (i and 4)) for i, split in enumerate(splits)]
        annotations = [annotation(item["ann_id"], image_id=item["image_id"]) for item in refs]
        write_refcoco(tmp_path, dataset, split_by, refs, map(coco_image, range(1, 10)), annotations)
    folder = tmp_path / "images" / "train2014"
    folder.mkdir(parents=True)
    for number in range(1, 10):
        shade = np.tile(np.linspace(0, 255, 640).astype(np.uint8), (480, 1))  # dark on the left
        Image.fromarray(shade).save(folder / coco_image(number)["file_name"])
    return tmp_path


def test_training_leaves_out_every_tested_image_and_adds_twins(refcoco_root, capsys):
    assert run("prepare", refcoco_root, "--task", "vanilla") == 0
    assert "paper 24,407: not the paper's number" in capsys.readouterr().out
    report = json.loads((refcoco_root / "prepare-vanilla.json").read_text())
    assert [
        (leak["dataset"], leak["leaked_samples"], leak["leaked_images"])
        for leak in report["leakage"]
    ] == [("refcoco", 1, 1), ("refcoco+", 1, 1), ("refcocog", 1, 1)]
    train = read_train(refcoco_root, "vanilla")
    assert set(train["image_id"]) == {"1"} and report["images"] == 1
    assert len(train) == report["samples"] == 3 * 3  # two sentences and one twin, three times
    assert report["not_flipped"] == {"left as a verb": 3}
    assert read_samples(refcoco_root / "selection.jsonl")["sample_id"][:] == train["sample_id"][:]
    for sample in train:
        pixels = np.asarray(open_image(resolve_image(sample, refcoco_root)))
        # The file shows what the row says
        assert (pixels[0, 0, 0] > pixels[0, -1, 0]) == sample["flipped"]
        assert sample["expression"] == ("right man" if sample["flipped"] else sample["expression"])
    assert [len(read_eval(refcoco_root, *split)) for split in EVAL_SPLITS] == [1] * 8


def test_leaks_and_flips_are_optional(refcoco_root):
    report = prepare(refcoco_root, tasks=["vanilla"], flips=False, keep_leaks=True)["vanilla"]
    assert report["samples"] == 9 and report["images"] == 2
    assert not (refcoco_root / "images" / "train2014_flip").exists()


def test_what_is_prepared_is_not_done_again(refcoco_root):
    prepare(refcoco_root, tasks=["vanilla"])
    before = (refcoco_root / "train.jsonl").stat().st_mtime_ns
    assert prepare(refcoco_root, tasks=["vanilla"])["vanilla"]["flipped"] is True
    # Not silently another thing
    with pytest.raises(ValueError, match="flipped = True; delete .*prepare-vanilla.json"):
        prepare(refcoco_root, tasks=["vanilla"], flips=False)
    assert (refcoco_root / "train.jsonl").stat().st_mtime_ns == before


def test_twins_leave_with_their_leaked_originals(refcoco_root):
    prepare(refcoco_root, tasks=["vanilla"], keep_leaks=True)
    train = read_train(refcoco_root, "vanilla")
    (kept,), (leak,) = remove_leakage(
        [train], [read_eval(refcoco_root, *split) for split in EVAL_SPLITS]
    )
    assert set(kept["image_id"]) == {"1"} and any(kept["flipped"])
    assert (leak.samples, leak.leaked_samples) == (len(train), len(train) - len(kept))


def test_amodal_data_is_cut_filtered_and_counted(tmp_path):
    hidden = region(occlude_rate=0.4, visible_mask=rle(10, 50, 60, 90))
    for split in ("train", "val", "test"):
        path = tmp_path / "coco_amodal" / "annotations" / f"COCO_amodal_{split}2014.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        outside = hidden | {"segmentation": [-10, 10, 60, 10, 60, 90]}
        write_coco_amodal(path, hidden, outside, region(), region(isStuff=1, occlude_rate=0.4))
        if split == "train":  # another image than that of val and test
            path.write_text(path.read_text().replace("57", "58"))
    (tmp_path / "tao_amodal").mkdir()
    write_tao(
        tmp_path / "tao_amodal" / "train.json",
        tao(1, (-40, 10, 60, 30)),
        tao(2, (0, 0, 5, 5), visibility=1.0),
    )
    report = prepare(tmp_path, tasks=["amodal"])["amodal"]
    assert report["boxes_outside"]["cut at the border"] == 4  # three splits and TAO
    assert report["left_out"] == {"occluded too little": 4, "stuff": 3}
    train = read_train(tmp_path, "amodal")
    assert train["gt_box"][:] == [[10, 10, 60, 90], [0, 10, 60, 90], [0, 10, 20, 40]]
    assert train["image"][0] == "images/val2014/COCO_val2014_000000000058.jpg"
    assert [len(read_eval(tmp_path, *split)) for split in AMODAL_SPLITS] == [2, 2]


def amodal_root(root):
    """COCO-Amodal alone: TAO-Amodal is given only to users who accept its terms."""
    hidden = region(occlude_rate=0.4, visible_mask=rle(10, 50, 60, 90))
    for split in ("train", "val", "test"):
        path = root / "coco_amodal" / "annotations" / f"COCO_amodal_{split}2014.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_coco_amodal(path, hidden)
        if split == "train":
            path.write_text(path.read_text().replace("57", "58"))


def test_amodal_data_is_prepared_without_tao_and_says_so(tmp_path, caplog):
    amodal_root(tmp_path)
    report = prepare(tmp_path, tasks=["amodal"])["amodal"]
    assert report["samples"] == 1 and report["tao_amodal"] is False
    assert "COCO-Amodal alone" in caplog.text and "tao_amodal_train" in caplog.text


@pytest.mark.parametrize("folder", ["tao_amodal", "tao_amodal/amodal_annotations"])
def test_tao_is_found_in_both_places(tmp_path, folder):
    amodal_root(tmp_path)
    (tmp_path / folder).mkdir(parents=True)
    write_tao(tmp_path / folder / "train.json", tao(1, (-40, 10, 60, 30)))
    report = prepare(tmp_path, tasks=["amodal"])["amodal"]
    assert report["samples"] == 2 and report["tao_amodal"] is True


def test_one_task_is_prepared_if_files_of_the_other_are_missing(refcoco_root, capsys):
    assert run("prepare", refcoco_root) == 2
    assert "amodal is not prepared: no file" in capsys.readouterr().err
    assert len(read_train(refcoco_root, "vanilla")) > 0
    assert not (refcoco_root / "train_amodal.jsonl").exists()
    assert run("prepare", refcoco_root, "--task", "vanilla") == 0  # all that a profile may want


def test_a_profile_with_the_amodal_task_alone_needs_no_vanilla_files(tmp_path):
    amodal_root(tmp_path)
    assert run("prepare", tmp_path, "--task", "amodal") == 0
    assert len(read_train(tmp_path, "amodal")) == 1
    assert not (tmp_path / "train.jsonl").exists()


@pytest.mark.parametrize("content", ["[]", "{", "null"])
def test_a_report_that_cannot_be_read_is_one_sentence(refcoco_root, capsys, content):
    (refcoco_root / "prepare-vanilla.json").write_text(content)
    assert run("prepare", refcoco_root, "--task", "vanilla") == 2
    assert "prepare-vanilla.json" in (error := capsys.readouterr().err)
    assert "delete it" in error and error.count("\n") == 1


def test_check_names_what_is_missing_or_other_than_stated(refcoco_root, capsys):
    prepare(refcoco_root, tasks=["vanilla"])
    assert run("check", refcoco_root) == 0
    folder = refcoco_root / "images" / "train2014"
    (folder / coco_image(3)["file_name"]).unlink()
    Image.new("L", (640, 481)).save(folder / coco_image(5)["file_name"])
    (folder / coco_image(7)["file_name"]).write_text("no image")
    # Beyond PIL's own limit
    Image.new("1", (20_000, 10_000)).save(folder / coco_image(2)["file_name"], format="PNG")
    assert run("check", refcoco_root) == 2
    out = capsys.readouterr().out
    assert f"{coco_image(3)['file_name']} (e.g. sample refcoco-val-10-100): no such file" in out
    assert "is 640 x 481 px, stated are 640 x 480" in out and out.count("not a readable image") >= 2


def test_a_rotated_image_has_its_upright_size(refcoco_root):
    prepare(refcoco_root, tasks=["vanilla"])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (480, 640)).save(
        refcoco_root / "images/train2014" / coco_image(3)["file_name"], exif=exif
    )
    assert list(image_faults(read_eval(refcoco_root, "refcoco", "val"), refcoco_root)) == []


def test_stats_print_table_3_beside_the_paper(refcoco_root, capsys):
    prepare(refcoco_root, tasks=["vanilla"])
    assert run("stats", refcoco_root) == 0
    out = capsys.readouterr().out
    # three data sets ask about the same box of one image; its mirrored twin is another file
    assert "| train.jsonl | 9 | 1 | 1.0 | 640.0 | 480.0 |" in out
    assert "| *paper, vanilla* | 575,208 | 24,407 | lost | lost | lost |" in out
    assert describe(read_train(refcoco_root, "vanilla").select([])) == dict(
        samples=0, images=0, boxes_per_image=0, width_px=0, height_px=0
    )


def test_boxes_per_image_counts_boxes_not_expressions(refcoco_root):
    row = load_refcoco(refcoco_root, dataset="refcoco", split="val")[0]
    rows = [row, row | {"sample_id": "b"}, row | {"sample_id": "c", "gt_box": [1, 2, 3, 4]}]
    assert describe(rows_to_dataset(rows, "test"))["boxes_per_image"] == 2


def test_the_command_line_says_what_is_missing(tmp_path, capsys):
    assert (
        run("stats", tmp_path) == 2
        and run("check", tmp_path) == 2
        and run("prepare", tmp_path) == 2
    )
    assert main(["fetch", "imagenet", "--root", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert "`prepare` makes them" in errors and "fetch" in errors and "'imagenet'" in errors
    assert list(tmp_path.iterdir()) == []
