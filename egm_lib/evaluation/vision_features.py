"""Do models of different size see the same? Similarity of vision features, and a box probe.

The features are the merged ones that the language model gets: one vector per cell of a coarse grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from egm_lib.boxes import Box, BoxFrame, convert, iou
from egm_lib.data import open_image, read_train, resolve_image
from egm_lib.inference.from_profile import model_of
from egm_lib.inference.loading import load_model, load_processor
from egm_lib.run import Run

RIDGE = 1e-2  # of the features' mean variance
IMAGES = 16  # that go through the tower together


def linear_cka(x_N_D: np.ndarray, y_N_E: np.ndarray) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, Sec. 3).

    0: unrelated; 1: equal up to a rotation and a scale. Rows are the same cells seen by two models.
    N should be many times D and E: with few rows even unrelated features look similar.
    Raises ValueError for different numbers of rows, or features that are equal in all rows.
    """
    x_N_D, y_N_E = np.asarray(x_N_D, dtype=np.float64), np.asarray(y_N_E, dtype=np.float64)
    if len(x_N_D) != len(y_N_E):
        raise ValueError(
            f"{len(x_N_D)} rows and {len(y_N_E)} rows: the features must be of the same cells"
        )
    x_N_D, y_N_E = x_N_D - x_N_D.mean(axis=0), y_N_E - y_N_E.mean(axis=0)
    sizes = [np.linalg.norm(z.T @ z) for z in (x_N_D, y_N_E)]
    if min(sizes) == 0:
        raise ValueError("features that are the same for all rows have no similarity")
    return float(np.linalg.norm(y_N_E.T @ x_N_D) ** 2 / (sizes[0] * sizes[1]))


def box_probe(
    features_N_D: np.ndarray, boxes_N_4: np.ndarray, held_out_N: np.ndarray
) -> np.ndarray:
    """IoU of each held-out row's box with the box that ridge regression predicts from its features.

    The regression is fitted on the other rows; all rows of an image should be on one side. Boxes
    may be in any frame, the same for all. A degenerate predicted box has IoU 0.
    """
    features_N_D, boxes_N_4 = (
        np.asarray(features_N_D, dtype=np.float64),
        np.asarray(boxes_N_4, dtype=np.float64),
    )
    held_out_N = np.asarray(held_out_N, dtype=bool)
    if held_out_N.all() or not held_out_N.any():
        raise ValueError("a probe needs rows to fit and rows held out")
    fit_K_D, fit_K_4 = features_N_D[~held_out_N], boxes_N_4[~held_out_N]
    mean_D, mean_4 = fit_K_D.mean(axis=0), fit_K_4.mean(axis=0)
    centred_K_D = fit_K_D - mean_D
    gram_D_D = centred_K_D.T @ centred_K_D
    variance = np.trace(gram_D_D) / len(gram_D_D)
    # Where all features are equal, the ridge alone keeps the matrix invertible.
    gram_D_D += (RIDGE * variance or 1.0) * np.eye(len(gram_D_D))
    weights_D_4 = np.linalg.solve(gram_D_D, centred_K_D.T @ (fit_K_4 - mean_4))
    predicted_M_4 = (features_N_D[held_out_N] - mean_D) @ weights_D_4 + mean_4
    return np.array(
        [iou(box, truth) for box, truth in zip(predicted_M_4, boxes_N_4[held_out_N], strict=True)]
    )


@torch.no_grad()
def cell_features(
    model, processor, images: Sequence[Image.Image], boxes: Sequence[Sequence[Box]]
) -> np.ndarray:
    """The merged features of the cell that holds the centre of a box (px), for each box.

    model, processor: of the Qwen3-VL family. boxes: those of each image, which is read once for all
    of them. Returns N x D, float64, for N boxes, image by image.
    """
    visual, rows = model.model.visual, []
    for start in range(0, len(images), IMAGES):
        part, part_boxes = images[start : start + IMAGES], boxes[start : start + IMAGES]
        inputs = processor.image_processor(list(part), return_tensors="pt")
        grids = inputs["image_grid_thw"]
        pixels = inputs["pixel_values"].to(visual.device, visual.dtype)
        merged = visual(pixels, grid_thw=grids.to(visual.device)).pooler_output
        cells = [
            (int(h) // visual.spatial_merge_size, int(w) // visual.spatial_merge_size)
            for _, h, w in grids
        ]
        for image, its_boxes, (height, width), features_T_D in zip(
            part, part_boxes, cells, merged.split([h * w for h, w in cells]), strict=True
        ):
            for box in its_boxes:
                x1, y1, x2, y2 = convert(box, BoxFrame.PIXEL, BoxFrame.NORM_1, image.size)
                # An amodal box may have its centre outside the image: the nearest cell
                row = min(max(int((y1 + y2) / 2 * height), 0), height - 1)
                column = min(max(int((x1 + x2) / 2 * width), 0), width - 1)
                rows.append(features_T_D[row * width + column].double().cpu().numpy())
    return np.stack(rows)


def compare_models(run: Run, models: Sequence[str], limit: int = 600) -> pd.DataFrame:
    """Each model's CKA with the first model, and the mean IoU of its probe.

    Measured on the first `limit` training samples of the run's first task; the probe is tested on
    every second image. The models are loaded, so they must fit this machine. A model of another
    family than Qwen3-VL cuts its images into tiles, and has no such cells: its numbers are missing.
    """
    root, task = run.profile.data.path, run.profile.tasks[0]
    of_image: dict[Path, list[Mapping]] = {}
    for sample in read_train(root, task, limit=limit):
        of_image.setdefault(resolve_image(sample, root), []).append(sample)
    images = [open_image(place) for place in of_image]
    boxes = [[sample["gt_box"] for sample in samples] for samples in of_image.values()]
    boxes_N_4 = np.array(
        [
            convert(box, BoxFrame.PIXEL, BoxFrame.NORM_1, image.size)
            for image, its_boxes in zip(images, boxes, strict=True)
            for box in its_boxes
        ]
    )
    image_id_N = [sample["image_id"] for samples in of_image.values() for sample in samples]
    held_out_N = pd.factorize(np.array(image_id_N))[0] % 2 == 1
    rows, first_N_D = [], None
    for name in models:
        checkpoint = model_of(run, name, task)
        if checkpoint.family != "qwen3-vl":
            rows.append({"model": name})
            continue
        model = load_model(checkpoint.location, checkpoint.dtype, family=checkpoint.family)
        processor = load_processor(checkpoint.location, checkpoint.family)
        features_N_D = cell_features(model, processor, images, boxes)
        first_N_D = features_N_D if first_N_D is None else first_N_D
        probed = box_probe(features_N_D, boxes_N_4, held_out_N)
        rows.append(
            {
                "model": name,
                f"CKA with {models[0]}": linear_cka(first_N_D, features_N_D),
                "cells": len(boxes_N_4),
                "probe, mean IoU": probed.mean(),
                "held out": len(probed),
            }
        )
    columns = ["model", f"CKA with {models[0]}", "cells", "probe, mean IoU", "held out"]
    return pd.DataFrame(rows, columns=columns).set_index("model")
