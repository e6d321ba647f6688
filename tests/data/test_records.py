"""Samples: what is written is read back, and a bad row is refused with file, row and reason."""

import json

import pytest
from PIL import Image

from egm_lib.data import (
    AMODAL_SPLITS,
    EVAL_SPLITS,
    SampleError,
    open_image,
    read_eval,
    read_samples,
    read_train,
    resolve_image,
    split_id,
    write_samples,
)
from egm_lib.data.images import ImageError, mirrored_name, write_mirrored


def sample(number=0, **changes):
    return (
        dict(
            sample_id=f"s{number}",
            dataset="refcoco",
            split="train",
            task="vanilla",
            image="images/a.png",
            width=640,
            height=480,
            expression="left dog",
            gt_box=[1.5, 2.0, 300.25, 400.0],
            image_id="7",
            flipped=False,
        )
        | changes
    )


def test_the_eight_test_splits_and_the_amodal_benchmark():
    assert [split_id(*split) for split in EVAL_SPLITS] == [
        "refcoco_val",
        "refcoco_testA",
        "refcoco_testB",
        "refcoco+_val",
        "refcoco+_testA",
        "refcoco+_testB",
        "refcocog_val",
        "refcocog_test",
    ]
    assert AMODAL_SPLITS == (("coco_amodal", "val"), ("coco_amodal", "test"))


def test_rows_come_back_as_written(tmp_path):
    rows = [
        sample(0, expression='naïve "quoted"\nline'),
        sample(
            1,
            task="amodal",
            gt_box=[-5.0, 2, 700, 400],
            modal_box=[0, 2, 30, 400],
            ann_id="3",
            num_lookalikes=2,
        ),
    ]
    assert write_samples(tmp_path / "a.jsonl", rows) == 2
    back = read_samples(tmp_path / "a.jsonl")
    absent = dict.fromkeys(("modal_box", "ann_id", "ref_id", "prompt_kind", "num_lookalikes"))
    assert list(back) == [absent | row for row in rows]
    write_samples(tmp_path / "b.jsonl", back)  # a Dataset is written as its rows are
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == (tmp_path / "b.jsonl").read_text(
        encoding="utf-8"
    )


def test_a_file_may_have_no_rows(tmp_path):
    assert write_samples(tmp_path / "a.jsonl", []) == 0
    assert len(read_samples(tmp_path / "a.jsonl")) == 0


BAD = [
    (dict(colour="red"), "unknown field 'colour'"),
    (dict(width="640"), "width = '640' is not int64"),
    (dict(width=0), "width is not positive"),
    (dict(width=float("nan")), "width = nan is not int64"),
    (dict(width=640.5), "width = 640.5 is not int64"),  # pyarrow would make it 640
    (dict(width=10**30), "is not int64"),
    (dict(expression="dog \ud83d"), "is not string"),  # half a surrogate pair
    (dict(gt_box=[1, 2, 3]), "four numbers"),
    (dict(gt_box=[1, 2, 3, float("nan")]), "not finite"),
    (dict(gt_box=[1, 2, None, 4]), "not finite"),
    (dict(gt_box=[300, 2, 1, 400]), "corners are swapped"),
    (dict(gt_box=[1, 2, 1, 400]), "empty"),
    (dict(gt_box=[1, 2, 642, 400]), "leaves the image"),  # more than annotators' rounding
    (dict(gt_box=None), "gt_box is missing"),
    (dict(task="panoptic"), "task is neither"),
    (dict(expression=" "), "expression is blank"),
    (dict(image=None), "image is missing"),
    (dict(modal_box=[1, 2, 3, 4]), "amodal samples only"),
    (dict(flipped="no"), "flipped = 'no' is not bool"),
]


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_a_row_that_contradicts_the_record_is_refused(tmp_path, change, reason):
    path = tmp_path / "a.jsonl"
    rows = [sample(0), sample(1), sample(2, **change), sample(3)]
    with pytest.raises(SampleError, match="row 3") as caught:
        write_samples(path, rows)
    assert reason in str(caught.value) and str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # nothing half-written
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SampleError, match="row 3") as caught:
        read_samples(path)
    assert reason in str(caught.value)


def test_a_box_may_leave_the_image_by_a_rounding(tmp_path):
    assert write_samples(tmp_path / "a.jsonl", [sample(gt_box=[-0.3, 0, 640.4, 480])]) == 1


def test_ids_are_unique_within_a_file(tmp_path):
    with pytest.raises(SampleError, match="'s1'"):
        write_samples(tmp_path / "a.jsonl", [sample(0), sample(1), sample(1)])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_samples(path, [sample(0)])

    def breaks():
        yield sample(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(path, breaks())
    assert read_samples(path)["sample_id"][:] == ["s0"] and len(list(tmp_path.iterdir())) == 1


def test_broken_json_names_its_line(tmp_path):
    latin_1 = json.dumps(sample(1)).encode().replace(b"s1", b"\xe9")
    for broken in (b"{broken", latin_1):
        (tmp_path / "a.jsonl").write_bytes(json.dumps(sample(0)).encode() + b"\n" + broken + b"\n")
        with pytest.raises(SampleError, match="row 2: not JSON"):
            read_samples(tmp_path / "a.jsonl")


@pytest.mark.parametrize("number", [0, 57])
def test_ids_may_be_numbers_as_in_cocos_files(tmp_path, number):
    row = sample(sample_id=number, image_id=number, ann_id=number, ref_id=number)
    write_samples(tmp_path / "written.jsonl", [row])
    (tmp_path / "plain.jsonl").write_text(json.dumps(row) + "\n")
    for name in ("written.jsonl", "plain.jsonl"):
        (back,) = read_samples(tmp_path / name)
        assert {back[key] for key in ("sample_id", "image_id", "ann_id", "ref_id")} == {str(number)}


@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b"\n", b"\n\xef\xbb\xbf", b"\r\n"])
def test_odd_separators_and_marks_do_not_end_a_sample(tmp_path, before):
    row = sample(expression="dog\u2028on\x85the left")
    line = json.dumps(row, ensure_ascii=False).encode()
    (tmp_path / "a.jsonl").write_bytes(before + line + b"\n\n")
    assert read_samples(tmp_path / "a.jsonl")["expression"][:] == [row["expression"]]


def test_a_data_root_is_read_by_task_and_split(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare"):
        read_train(tmp_path, "vanilla")
    write_samples(
        tmp_path / "train_amodal.jsonl", [sample(number, task="amodal") for number in range(5)]
    )
    write_samples(tmp_path / "eval" / "refcoco+_testA.jsonl", [sample(9)])
    assert (
        len(read_train(tmp_path, "amodal")) == 5
        and len(read_train(tmp_path, "amodal", limit=2)) == 2
    )
    assert read_eval(tmp_path, "refcoco+", "testA", limit=7)["sample_id"][:] == ["s9"]


def test_images_stay_below_the_root(tmp_path):
    assert resolve_image(sample(), tmp_path) == tmp_path / "images/a.png"
    assert resolve_image(sample(image="/data/a.png"), tmp_path).as_posix() == "/data/a.png"
    with pytest.raises(ValueError, match="leaves the data root"):
        resolve_image(sample(image="images/../../secret.png"), tmp_path)


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("L", 200, "png", (200, 200, 200)),
        ("I;16", 200 * 256, "png", (200, 200, 200)),  # scaled, not clipped to white
        ("CMYK", (0, 255, 255, 0), "tif", (255, 0, 0)),
        ("RGBA", (10, 20, 30, 0), "png", (10, 20, 30)),
        ("1", 1, "png", (255, 255, 255)),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, colour, suffix, expected):
    Image.new(mode, (4, 3), colour).save(tmp_path / f"a.{suffix}")
    image = open_image(tmp_path / f"a.{suffix}")
    assert (image.mode, image.size, image.getpixel((1, 1))) == ("RGB", (4, 3), expected)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    seen = open_image(tmp_path / "a.png")
    assert seen.size == (2, 4) and seen.getpixel((1, 0)) == (255, 255, 255)


def test_images_that_cannot_be_shown(tmp_path):
    Image.new("L", (100, 100)).save(tmp_path / "large.png")
    with pytest.raises(ImageError, match="100 x 100"):
        open_image(tmp_path / "large.png", max_pixels=9_999)
    whole = (tmp_path / "large.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("cut.png", "text.jpg"):
        with pytest.raises(ImageError, match=name):
            open_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="check"):
        open_image(tmp_path / "none.png")


@pytest.mark.parametrize("name", ["images/train2014/a.jpg", "a.png", "/data/coco/a.jpg"])
def test_a_mirrored_name_is_another_one_and_mirrors_back(name):
    assert mirrored_name(name) != name and mirrored_name(mirrored_name(name)) == name


def test_a_mirrored_image(tmp_path):
    image = Image.new("RGB", (3, 1), "black")
    image.putpixel((0, 0), (255, 0, 0))
    image.save(tmp_path / "a.png")
    write_mirrored(tmp_path / "a.png", tmp_path / "flip" / "a.png")
    assert open_image(tmp_path / "flip" / "a.png").getpixel((2, 0)) == (255, 0, 0)
