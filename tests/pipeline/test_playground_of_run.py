"""The playground on the models of a run: which are offered, and what the images are."""

from dataclasses import replace

import pytest

from egm_lib.errors import InputError
from egm_lib.pipeline.playground import NUM_SAMPLES, playground
from egm_lib.profile import load_profile
from egm_lib.run import Run


@pytest.fixture
def run() -> Run:
    """A run of the miniature that has trained nothing."""
    return Run(replace(load_profile("mini"), name="untrained"), 0)


def test_the_bases_are_offered_without_loading_one(run):
    page = playground(run)
    offered = [model["model"] for model in page.choices["models"]]
    assert offered == ["small-base", "reference", "large-base"]
    assert page.chosen == ["small-base", "reference"] and not page._made


def test_a_model_that_was_not_trained_is_refused_by_name(run):
    with pytest.raises(InputError, match="no checkpoint of small-egm.*train it first"):
        playground(run, models=["small-base", "small-egm"])


@pytest.mark.parametrize("task", ["vanilla", "amodal"])
def test_the_images_are_scenes_whose_objects_can_be_moved(run, task):
    page = playground(run, task=task)
    assert page.choices["samples"] == NUM_SAMPLES and page.view["objects"]
    assert page.view["gt_box"] and bool(page.view["modal_box"]) == (task == "amodal")
    page.move(0, (5, 5))
    assert page.view["name"] == "sample 1, rearranged"
