"""Readers of all sources, on small files in each published format with its oddities.

Tests on real samples are skipped without the shared data.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
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

from egm_lib.boxes import iou
from egm_lib.data import (
    SampleError,
    load_coco_amodal,
    load_jsonl,
    load_refcoco,
    load_tao_amodal,
    open_image,
    resolve_image,
)
from egm_lib.data.amodal import fit_to_image
from egm_lib.data.jsonl import image_ids, load_rl_parquet
from egm_lib.parsing import parse_completion
from egm_lib.prompts import FAMILIES

NAN = float("nan")
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_refcoco_gives_a_sample_per_sentence(tmp_path, protocol):
    write_refcoco(
        tmp_path,
        refs=[ref(1, sents=("man on left", "guy")), ref(2, split="testA"), ref(3)],
        images=[coco_image()],
        annotations=[annotation(1), annotation(2), annotation(3)],
        protocol=protocol,
    )
    rows = load_refcoco(tmp_path, dataset="refcoco", split="train", image_root="images/train2014")
    assert rows["expression"][:] == ["man on left", "guy", "man on left"]
    assert rows[0] == dict(
        sample_id="refcoco-train-1-10",
        dataset="refcoco",
        split="train",
        task="vanilla",
        image="images/train2014/COCO_train2014_000000000057.jpg",
        width=640,
        height=480,
        expression="man on left",
        gt_box=[10, 20, 110.5, 220],
        modal_box=None,
        image_id="57",
        ann_id="1",
        ref_id="1",
        flipped=False,
        prompt_kind=None,
        num_lookalikes=2,
    )
    assert len(load_refcoco(tmp_path, dataset="refcoco", split="testA")) == 1


def test_a_python_2_pickle(tmp_path):
    write_refcoco(tmp_path, images=[coco_image()], annotations=[annotation(1)])
    # protocol 0 as Python 2 wrote it: str as S'...' with UTF-8 bytes inside
    text = (
        b"(lp0\n(dp1\nS'ref_id'\np2\nI1\nsS'ann_id'\nI1\nsS'image_id'\nI57\nsS'split'\nS'val'\nsS'sentences'\n"
        b"(lp3\n(dp4\nS'sent_id'\nI5\nsS'sent'\nS'caf\\xc3\\xa9 on left'\nsasa."
    )
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(text)
    assert load_refcoco(tmp_path, dataset="refcoco", split="val")["expression"][:] == [
        "café on left"
    ]


@pytest.mark.parametrize(
    ("dataset", "split_by", "split"),
    [
        ("refcoco", None, "testB"),
        ("refcoco+", None, "testA"),
        ("refcocog", None, "test"),
        ("refcocog", "umd", "val"),
        ("refcocog", "google", "val"),
    ],
)
def test_each_data_set_has_its_own_splits(tmp_path, dataset, split_by, split):
    write_refcoco(
        tmp_path,
        dataset,
        split_by or ("umd" if dataset == "refcocog" else "unc"),
        refs=[ref(1, split=split)],
        images=[coco_image()],
        annotations=[annotation(1)],
    )
    assert len(load_refcoco(tmp_path, dataset=dataset, split=split, split_by=split_by)) == 1


def test_unknown_splits_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="refcocog \\(umd\\): train, val, test"):
        load_refcoco(tmp_path, dataset="refcocog", split="testA")
    with pytest.raises(FileNotFoundError, match="fetch"):
        load_refcoco(tmp_path, dataset="refcoco", split="val")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (ref(2, ann_id=99), "99 is neither a field"),
        (ref(2, image_id=58), "58 is neither"),
        ({"ref_id": 2}, "'split' is neither"),
        (ref(2, sentences=[{"sent_id": 1}]), "'sent' is neither"),
        (ref(2, sentences=[7]), "not a reference"),
        (ref(2, sentences=None), "not a reference"),
        (ref(2, ann_id=3), "image 59"),
        ("text", "not a reference"),
    ],
)
def test_a_reference_that_does_not_fit_is_named(tmp_path, bad, reason):
    write_refcoco(
        tmp_path,
        refs=[ref(1), bad],
        images=[coco_image(), coco_image(59)],
        annotations=[annotation(1), annotation(2), annotation(3, image_id=59)],
    )
    with pytest.raises(SampleError, match="row 2") as caught:
        load_refcoco(tmp_path, dataset="refcoco", split="train")
    assert reason in str(caught.value) and "refs(unc).p" in str(caught.value)


@pytest.mark.parametrize(
    "bbox", [(10, 20, 0, 200), (10, 20, 5, 0), (10, 20, -1, 5), (1, 2, NAN, 4)]
)
def test_boxes_without_area_are_left_out_and_counted(tmp_path, bbox):
    write_refcoco(
        tmp_path,
        refs=[ref(1, sents=("man", "guy")), ref(2)],
        images=[coco_image()],
        annotations=[annotation(1, bbox=bbox), annotation(2)],
    )
    counts = Counter()
    rows = load_refcoco(tmp_path, dataset="refcoco", split="train", counts=counts)
    assert rows["ref_id"][:] == ["2"] and counts == {"no area": 2}  # sentences


@pytest.mark.parametrize("width", [NAN, 0, -640, 640.5, "640"])
def test_an_impossible_width_is_named(tmp_path, width):
    images = [coco_image() | {"width": width}]
    write_refcoco(tmp_path, refs=[ref(1)], images=images, annotations=[annotation(1)])
    with pytest.raises(SampleError, match="row 1: width"):
        load_refcoco(tmp_path, dataset="refcoco", split="train")


def test_blank_sentences_are_left_out_and_counted(tmp_path):
    write_refcoco(
        tmp_path,
        refs=[ref(1, sents=("", "man", " "))],
        images=[coco_image()],
        annotations=[annotation(1)],
    )
    counts = Counter()
    assert len(load_refcoco(tmp_path, dataset="refcoco", split="train", counts=counts)) == 1
    assert counts == {"blank sentence": 2}


LINE = dict(
    image="train2014/COCO_train2014_000000000057.jpg",
    sent=" left man ",
    bbox=[1, 2, 30.5, 40],
    width=640,
    height=480,
)


def test_jsonl_as_evaluators_write_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        json.dumps(LINE | {"note": [1, {"x": 2}]})
        + "\n"
        + json.dumps(LINE | {"image": "plain.png"})
        + "\n"
    )
    rows = load_jsonl(path, dataset="refcoco", split="val", image_root="coco")
    assert rows["expression"][:] == ["left man", "left man"]
    assert rows["gt_box"][0] == [1, 2, 30.5, 40] and rows["image_id"][:] == ["57", "plain.png"]
    assert rows["image"][:] == ["coco/train2014/COCO_train2014_000000000057.jpg", "coco/plain.png"]
    assert len(set(rows["sample_id"])) == 2 and set(rows["task"]) == {"vanilla"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(bbox=[1, 2, 3]), "four numbers"),
        (dict(bbox=[1, 2, 3000, 40]), "leaves the image"),
        (dict(sent=None), "expression is missing"),
        (dict(width="wide"), "wide"),
        (dict(bbox="1,2,3,4"), "list"),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "list"])
def test_jsonl_refuses_with_file_row_and_reason(tmp_path, change, reason, form):
    path = tmp_path / "a.jsonl"
    rows = [LINE, LINE | change]
    path.write_text(
        json.dumps(rows) if form == "list" else "".join(json.dumps(row) + "\n" for row in rows)
    )
    with pytest.raises(SampleError, match="row 2") as caught:
        load_jsonl(path, dataset="refcoco", split="val")
    assert reason in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "before", [b"", b"\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n ", b"\n\xef\xbb\xbf"]
)
@pytest.mark.parametrize("form", ["jsonl", "list"])
def test_what_stands_before_a_json_list_or_lines_does_not_matter(tmp_path, before, form):
    row = LINE | {"sent": "left\u2028man\x85"}
    rows = json.dumps([row] * 2, ensure_ascii=False)
    lines = (json.dumps(row, ensure_ascii=False) + "\n") * 2
    content = before + (rows if form == "list" else lines).encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    samples = load_jsonl(tmp_path / "a.jsonl", dataset="refcoco", split="val")
    assert samples["expression"][:] == ["left\u2028man"] * 2


@pytest.mark.parametrize("form", ["jsonl", "list"])
def test_rows_without_area_or_words_are_left_out_and_counted(tmp_path, form):
    """As in RefCOCO's own files. A row keeps the number that it has in the file."""
    changes = [{}, {"bbox": [5, 2, 5, 40]}, {"sent": " "}, {"bbox": [1, 7, 3, 7]}, {"sent": "dog"}]
    rows = [LINE | change for change in changes]
    (tmp_path / "a.jsonl").write_text(
        json.dumps(rows) if form == "list" else "".join(json.dumps(row) + "\n" for row in rows)
    )
    counts = Counter()
    samples = load_jsonl(tmp_path / "a.jsonl", dataset="refcoco", split="val", counts=counts)
    assert samples["sample_id"][:] == ["refcoco-val-000001", "refcoco-val-000005"]
    assert counts == {"no area": 2, "blank sentence": 1}


@pytest.mark.parametrize("bbox", [[30, 2, 10, 40], [NAN, 2, 10, 40], None, [1, 2, None, 4]])
def test_a_box_that_is_none_is_named_in_jsonl(tmp_path, bbox):
    """Boxes as x, y, width and height look like swapped corners here and there."""
    rows = [LINE, LINE | {"bbox": bbox}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SampleError, match="row 2"):
        load_jsonl(tmp_path / "a.jsonl", dataset="refcoco", split="val")


def test_a_file_without_rows_has_no_samples(tmp_path):
    for content in (b"", b"\n", b"\xef\xbb\xbf", b"[]"):
        (tmp_path / "a.jsonl").write_bytes(content)
        assert len(load_jsonl(tmp_path / "a.jsonl", dataset="refcoco", split="val")) == 0


@needs_shared
def test_the_shared_sample_survives_both_families_targets():
    rows = load_jsonl(
        SHARED / "refcoco_sample" / "refcoco_testA_sample.jsonl", dataset="refcoco", split="testA"
    )
    assert len(rows) == 26 and len(set(rows["image_id"])) == 2
    for row in rows:
        image_wh = row["width"], row["height"]
        assert open_image(resolve_image(row, SHARED / "refcoco_sample")).size == image_wh
        for family in FAMILIES.values():
            answer = family.answer(
                row["gt_box"], image_wh, row["expression"], "It is the one asked for."
            )
            back = parse_completion(answer, frame=family.frame, image_wh=image_wh).box
            # a 0-1000 integer is at most half a thousandth of the image off
            errors = np.abs(np.subtract(back, row["gt_box"])) / np.tile(image_wh, 2) * 1000
            assert errors.max() <= 0.5 + 1e-9


@needs_shared
def test_the_shared_test_set_loads_without_its_empty_cases():
    document = json.loads((SHARED / "refcocos_test.json").read_text())
    counts = Counter()
    rows = load_jsonl(
        SHARED / "refcocos_test.json", dataset="refcocos", split="test", counts=counts
    )
    full = [row for row in document if not row["categories"]["empty_case"]]
    assert rows["expression"][:] == [row["normal_caption"] for row in full]
    assert rows["gt_box"][:] == [row["solution"] for row in full]
    assert counts == {"no object fits": len(document) - len(full)} and len(full) < len(document)


@pytest.mark.parametrize(
    ("question", "task"),
    [
        ("<image>\nLocate man on left, output its bbox coordinates using JSON format", "vanilla"),
        (
            "<image>\nLocate man on left amodally, output its bbox coordinates using JSON format.",
            "amodal",
        ),
        (
            "<image>\nPlease provide the bounding box coordinate of the region this sentence "
            "describes: "
            "<ref>man on left</ref>",
            "vanilla",
        ),
    ],
)
def test_the_authors_rl_rows_become_pixels(tmp_path, question, task):
    row = dict(
        data_source="grounding",
        prompt=[dict(role="user", content=question)],
        ability="grounding",
        images=["/lustre/someone/coco_flip/train2014/COCO_train2014_000000000057.jpg"],
        reward_model=dict(style="rule", ground_truth=[0, 250, 500, 1000]),
        extra_info=dict(split="train", index=0, height=480, width=640, question=question),
    )
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train_grounding.parquet")
    (sample,) = load_rl_parquet(
        tmp_path / "train_grounding.parquet", dataset="egm_rl", split="train", image_root="egm"
    )
    assert (sample["expression"], sample["task"]) == ("man on left", task)
    assert sample["gt_box"] == [0, 120, 320, 480]
    assert sample["image"] == "egm/coco_flip/train2014/COCO_train2014_000000000057.jpg"
    assert sample["image_id"] == "57" and sample["flipped"]


def runs(x1, y1, x2, y2, width=100, height=120):
    """The same mask as uncompressed column-wise runs, starting with the zeros."""
    mask = np.zeros((width, height), int)
    mask[x1:x2, y1:y2] = 1
    edges = np.flatnonzero(np.diff(mask.ravel(), prepend=0, append=mask.ravel()[-1] ^ 1))
    return {"size": [height, width], "counts": np.diff(edges, prepend=0).tolist()}


@pytest.mark.parametrize("mask", [rle, runs])
def test_coco_amodal_gives_the_whole_and_the_visible_box(tmp_path, mask):
    path = write_coco_amodal(
        tmp_path / "a.json",
        region(),
        region(occlude_rate=0.5, visible_mask=mask(10, 50, 60, 90), name="cat"),
        region(segmentation=[[0, 0, 5, 0, 5, 5], [20, 20, 30, 20, 30, 40]], name="dog"),
    )
    rows = load_coco_amodal(path, split="val", image_root="images")
    assert rows["gt_box"][:] == [[10, 10, 60, 90], [10, 10, 60, 90], [0, 0, 30, 40]]
    # Null mask: nothing is hidden
    assert rows["modal_box"][:] == [[10, 10, 60, 90], [10, 50, 60, 90], [0, 0, 30, 40]]
    assert rows["num_lookalikes"][:] == [1, 0, 1] and rows["image_id"][:] == ["57"] * 3
    assert (
        set(rows["task"]) == {"amodal"}
        and rows["image"][0] == "images/COCO_val2014_000000000057.jpg"
    )


@pytest.mark.parametrize("mask", [rle, runs])
def test_coco_amodal_segments_may_be_masks(tmp_path, mask):
    rows = load_coco_amodal(
        write_coco_amodal(tmp_path / "a.json", region(segmentation=mask(3, 7, 20, 31))), split="val"
    )
    assert rows["gt_box"][:] == [[3, 7, 20, 31]]


def test_coco_amodal_filters_and_counts(tmp_path):
    counts = Counter()
    path = write_coco_amodal(
        tmp_path / "a.json",
        region(),
        region(isStuff=1),
        region(occlude_rate=0.3, name="cup"),
        region(occlude_rate=0.3, segmentation=[1, 1, 1, 5, 1, 9]),
        region(occlude_rate=1.0, visible_mask=rle(0, 0, 0, 0)),
    )
    rows = load_coco_amodal(path, split="val", stuff=False, min_occlusion=0.1, counts=counts)
    assert rows["expression"][:] == ["cup", "dog"] and rows["modal_box"][1] is None  # wholly hidden
    assert counts == {"stuff": 1, "occluded too little": 1, "no area": 1}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(visible_mask=rle(0, 0, 5, 5, width=50)), "mask of size"),
        # Promises a character too many
        (dict(visible_mask={"size": [120, 100], "counts": "PPPo"}), "run-length code"),
        (dict(visible_mask={"size": [120, 100], "counts": [5, 5]}), "add up"),
        (dict(visible_mask={"size": [120, 100], "counts": [-5, 12005]}), "add up"),
        (dict(segmentation=[1, 2, 3, 4, 5, 6, 7]), "odd number"),
        (dict(segmentation=None), "not a region"),
        (dict(name=None), "not a region"),
    ],
)
def test_coco_amodal_refuses_with_file_region_and_reason(tmp_path, change, reason):
    path = write_coco_amodal(tmp_path / "a.json", region(), region(**change))
    with pytest.raises(SampleError, match="annotation 5, region 1") as caught:
        load_coco_amodal(path, split="val")
    assert reason in str(caught.value) and str(path) in str(caught.value)


def test_null_in_an_amodal_annotation_means_not_given(tmp_path):
    path = write_coco_amodal(tmp_path / "a.json", region(occlude_rate=None, isStuff=None))
    document = json.loads(path.read_text())
    document["annotations"].append(dict(id=6, image_id=57, regions=None))
    path.write_text(json.dumps(document))
    assert len(load_coco_amodal(path, split="val")) == 1
    path = write_tao(
        tmp_path / "b.json",
        tao(1, (0, 0, 5, 5), visibility=None, amodal_is_uncertain=None),
        tao(2, (0, 0, 5, 5), bbox=()),
    )
    rows = load_tao_amodal(path, split="train", min_occlusion=0.0)
    assert rows["modal_box"][:] == [[0, 10, 20, 40], None]


@pytest.mark.parametrize(
    "change",
    [
        dict(images=None),
        dict(images=[None]),
        dict(annotations=None),
        dict(annotations=[None]),
        dict(annotations=[dict(id=5, image_id=[57], regions=[])]),
        dict(annotations=[dict(id=5, image_id=57, regions=[None])]),
        dict(annotations=[dict(id=5, image_id=57, regions=[region(name=["dog"])])]),
        dict(annotations=[dict(id=5, image_id=57, regions=[region(segmentation=["a", "b"] * 3)])]),
    ],
)
def test_coco_amodal_of_another_shape_is_one_sentence(tmp_path, change):
    path = write_coco_amodal(tmp_path / "a.json", region())
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SampleError, match="a.json"):
        load_coco_amodal(path, split="val")


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b"7", "{}".encode("utf-16"), b'{"images": []}']
)
@pytest.mark.parametrize("load", [load_coco_amodal, load_tao_amodal])
def test_a_file_that_holds_no_annotations_is_one_sentence(tmp_path, load, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(SampleError, match="a.json"):
        load(tmp_path / "a.json", split="val")


def test_tao_categories_of_another_shape_are_one_sentence(tmp_path):
    path = write_tao(tmp_path / "a.json", tao(1, (0, 0, 5, 5)))
    for categories in (None, [None], [{"id": 805}]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"categories": categories}))
        with pytest.raises(SampleError, match="a.json"):
            load_tao_amodal(path, split="train")


def test_tao_boxes_may_leave_the_image(tmp_path):
    path = write_tao(
        tmp_path / "a.json",
        tao(1, (-40, 10, 60, 30)),
        tao(2, (-90, 0, 50, 40), visibility=0.0),
        tao(3, (0, 0, 5, 5), amodal_is_uncertain=True),
    )
    rows = load_tao_amodal(path, split="train", image_root="tao")
    assert rows["gt_box"][:] == [[-40, 10, 20, 40], [-90, 0, -40, 40], [0, 0, 5, 5]]
    # Visibility 0: nothing to see
    assert rows["modal_box"][:] == [[0, 10, 20, 40], None, [0, 10, 20, 40]]
    # Not COCO's image 3
    assert rows["expression"][0] == "baby buggy" and rows["image_id"][0] == "tao-3"
    assert rows["image"][0] == "tao/train/YFCC100M/v/frame0391.jpg"
    assert len(load_tao_amodal(path, split="train", uncertain=False)) == 2
    assert len(load_tao_amodal(path, split="train", min_occlusion=0.9)) == 1


def test_boxes_are_cut_at_the_border_of_the_image(tmp_path):
    path = write_tao(
        tmp_path / "a.json",
        tao(1, (-40, 10, 60, 30)),
        tao(2, (-90, 0, 50, 40)),
        tao(3, (5, 5, 10, 10)),
    )
    samples, counts = load_tao_amodal(path, split="train"), Counter()
    fitted = fit_to_image(samples, counts)
    assert fitted["gt_box"][:] == [[0, 10, 20, 40], [5, 5, 15, 15]]
    assert iou(fitted["gt_box"][0], samples["gt_box"][0]) < 0.5
    assert counts == {
        "cut at the border": 1,
        "of these, IoU with the whole box < 0.5": 1,
        "wholly outside": 1,
    }


def test_tao_refuses_what_does_not_fit(tmp_path):
    path = write_tao(tmp_path / "a.json", tao(1, (0, 0, 5, 5)), tao(2, (0, 0, 5, 5), category_id=1))
    with pytest.raises(SampleError, match="annotation 2"):
        load_tao_amodal(path, split="train")
    with pytest.raises(SampleError, match="image 9"):
        load_tao_amodal(
            write_tao(tmp_path / "b.json", tao(1, (0, 0, 5, 5), image_id=9)), split="train"
        )
    (tmp_path / "c.json").write_text("[" * 100_000)
    with pytest.raises(SampleError, match="not JSON"):
        load_tao_amodal(tmp_path / "c.json", split="train")


@pytest.mark.parametrize(
    ("image", "image_id"),
    [
        ("train2014/COCO_train2014_000000000057.jpg", "57"),
        ("val2017/000000000057.jpg", "57"),  # the same image in COCO 2017
        ("COCO_train2014_000000000000.png", "0"),
        ("frames/0391.jpg", "frames/0391.jpg"),  # a frame's number is no COCO number
    ],
)
def test_the_id_of_an_image_does_not_depend_on_its_folder(image, image_id):
    assert image_ids(pa.chunked_array([[image]])).to_pylist() == [image_id]
