"""Section 4.2's selection: which rows, how many, and that nothing but seed and sample decides."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from egm_lib.learnability import select_learnable

RNG = np.random.default_rng(0)
SIZE = 4000
LEARNER, REFERENCE = RNG.random(SIZE) < 0.8, RNG.random(SIZE) < 0.9
IDS = np.array([f"refcoco/train/{i}" for i in range(SIZE)])


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60), st.integers(0, 2**40))
@pytest.mark.filterwarnings("ignore:only")
def test_hard_and_easy_are_what_section_4_2_says(pairs, seed):
    learner, reference = [a for a, _ in pairs], [b for _, b in pairs]
    hard, easy = select_learnable(learner, reference, seed=seed)
    assert hard.tolist() == [i for i, (a, b) in enumerate(pairs) if b - a > 0]
    assert set(easy.tolist()) <= {i for i, a in enumerate(learner) if a}
    assert len(easy) == min(len(hard), sum(learner)) == len(set(easy.tolist()))
    assert easy.tolist() == sorted(easy.tolist())


def test_the_same_seed_draws_the_same_and_another_seed_another():
    first, again, other = (select_learnable(LEARNER, REFERENCE, seed=seed)[1] for seed in (7, 7, 8))
    assert first.tolist() == again.tolist()
    overlap = len(np.intersect1d(first, other)) / len(first)
    # What independent draws would share
    assert overlap == pytest.approx(len(first) / LEARNER.sum(), abs=0.06)


@pytest.mark.parametrize("easy", ["uniform", "iou-buckets"])
def test_keyed_by_sample_the_order_of_rows_does_not_matter(easy):
    iou = np.where(LEARNER, RNG.uniform(0.5, 1, SIZE), 0.1)
    order = RNG.permutation(SIZE)
    hard, drawn = select_learnable(
        LEARNER, REFERENCE, seed=1, easy=easy, sample_ids=IDS, learner_iou_N=iou
    )
    hard_2, drawn_2 = select_learnable(
        LEARNER[order],
        REFERENCE[order],
        seed=1,
        easy=easy,
        sample_ids=list(IDS[order]),
        learner_iou_N=iou[order],
    )
    assert set(IDS[hard]) == set(IDS[order][hard_2])
    assert set(IDS[drawn]) == set(IDS[order][drawn_2])


def test_removing_a_sample_that_was_not_drawn_changes_nothing():
    _, easy = select_learnable(LEARNER, REFERENCE, seed=3, sample_ids=IDS)
    spare = np.setdiff1d(np.flatnonzero(LEARNER), easy)[0]
    keep = np.arange(SIZE) != spare
    _, easy_2 = select_learnable(LEARNER[keep], REFERENCE[keep], seed=3, sample_ids=IDS[keep])
    assert set(IDS[easy]) == set(IDS[keep][easy_2])


def test_the_easy_half_is_drawn_uniformly():
    counts = np.zeros(SIZE)
    for seed in range(200):
        counts[select_learnable(LEARNER, REFERENCE, seed=seed)[1]] += 1
    right, drawn = LEARNER.sum(), counts.sum() / 200
    expected = 200 * drawn / right
    chi_square = ((counts[LEARNER] - expected) ** 2 / (expected * (1 - drawn / right))).sum()
    assert abs(chi_square - right) < 4 * np.sqrt(2 * right)
    assert counts[~LEARNER].sum() == 0


def test_iou_buckets_have_the_shares_of_the_released_code():
    iou = np.where(LEARNER, RNG.uniform(0.5, 1, SIZE), 0.1)
    hard, easy = select_learnable(
        LEARNER, REFERENCE, seed=42, easy="iou-buckets", learner_iou_N=iou
    )
    shares = np.histogram(iou[easy], bins=[0.5, 0.6, 0.7, 0.8, 0.9, 1.01])[0]
    assert shares[:4].tolist() == [round(len(hard) * share) for share in (0.15, 0.2, 0.2, 0.2)]
    assert shares.sum() == len(hard)


def test_a_bucket_with_too_few_is_left_short_as_in_the_released_code():
    iou = np.where(LEARNER, 0.95, 0.1)
    hard, easy = select_learnable(
        LEARNER, REFERENCE, seed=42, easy="iou-buckets", learner_iou_N=iou
    )
    assert len(easy) == len(hard) - sum(round(len(hard) * share) for share in (0.15, 0.2, 0.2, 0.2))


def test_too_few_easy_samples_are_reported_and_all_taken():
    with pytest.warns(UserWarning, match="only 1 easy samples for 3 hard ones"):
        hard, easy = select_learnable([1, 0, 0, 0], [1, 1, 1, 1], seed=0)
    assert hard.tolist() == [1, 2, 3] and easy.tolist() == [0]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(reference_success_N=[1]), "reference_success_N has 1 rows, learner_success_N has 2"),
        (dict(sample_ids=["a"]), "sample_ids has 1 rows"),
        (dict(sample_ids=["a", "a"]), "1 sample ids occur more than once, such as 'a'"),
        (dict(easy="hardest"), "unknown easy rule 'hardest': use one of uniform, iou-buckets"),
        (dict(easy="iou-buckets"), "needs learner_iou_N"),
        (dict(easy="iou-buckets", learner_iou_N=[0.5]), "learner_iou_N has 1 rows"),
        (dict(learner_success_N=[0.7, 1]), "learner_success_N must be 0 or 1, got .*0.7"),
        (dict(learner_success_N=[[0, 1]]), "one value a sample"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(learner_success_N=[0, 1], reference_success_N=[1, 1], seed=0) | change
    with pytest.raises(ValueError, match=message):
        select_learnable(**arguments)
