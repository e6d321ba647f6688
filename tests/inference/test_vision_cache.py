"""The cached tower gives the tower's outputs, encodes an image once, and its memory is bounded."""

import pytest
import torch
from tiny_qwen import tiny_qwen

from egm_lib.inference.vision_cache import VisionCache, freeze_vision, tower_digest

GRID_3 = torch.tensor([1, 4, 4])
ROWS = 16


def some_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count * ROWS, 3 * 2 * 8 * 8, generator=generator), GRID_3.repeat(count, 1)


def assert_equal_outputs(a, b):
    torch.testing.assert_close(a.pooler_output, b.pooler_output, atol=1e-5, rtol=0)
    for left, right in zip(a.deepstack_features, b.deepstack_features, strict=True):
        torch.testing.assert_close(left, right, atol=1e-5, rtol=0)


def test_cached_equals_uncached_first_and_later_and_in_another_order():
    visual = tiny_qwen()[0].model.visual
    pixels, grids = some_images(3)
    with torch.no_grad():
        expected = visual(pixels, grid_thw=grids)
        mixed = torch.cat([pixels[2 * ROWS :], pixels[:ROWS], pixels[2 * ROWS :]])
        expected_mixed = visual(mixed, grid_thw=grids)
    model = tiny_qwen()[0]
    cache = freeze_vision(model)
    assert_equal_outputs(model.model.visual(pixels, grid_thw=grids), expected)
    assert_equal_outputs(model.model.visual(pixels, grid_thw=grids), expected)
    assert_equal_outputs(model.model.visual(mixed, grid_thw=grids), expected_mixed)
    assert (cache.misses, len(cache)) == (3, 3)


def test_whole_model_gives_the_same_logits_and_the_same_parameter_names():
    plain, processor = tiny_qwen()
    cached = tiny_qwen()[0]
    freeze_vision(cached)
    pixels, grids = some_images(2)
    image = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ids = torch.tensor([[5, image, image, image, image, 7, 8]] * 2)
    inputs = dict(
        input_ids=ids,
        pixel_values=pixels,
        image_grid_thw=grids,
        mm_token_type_ids=(ids == image).int(),
    )
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(
                cached(**inputs).logits, plain(**inputs).logits, atol=1e-5, rtol=0
            )
    assert list(cached.state_dict()) == list(plain.state_dict())
    assert not any(p.requires_grad for p in cached.model.visual.parameters())


def test_memory_is_bounded_and_the_least_recently_used_goes_first():
    model = tiny_qwen()[0]
    pixels, grids = some_images(3)
    one = freeze_vision(tiny_qwen()[0])
    one_image = 4 * 64 * 4 * 2  # 4 tokens x 64 x float32, merged and one deepstack layer
    cache = freeze_vision(model, VisionCache(max_bytes=2 * one_image))
    assert one.nbytes == 0
    visual = model.model.visual
    for index in (0, 1, 0, 2, 0):  # 1 is dropped for 2; 0, used again and again, stays
        visual(pixels[index * ROWS : (index + 1) * ROWS], grid_thw=grids[:1])
    assert (len(cache), cache.misses, cache.hits) == (2, 3, 2)
    assert cache.nbytes <= cache.max_bytes


def test_towers_share_a_cache_without_mixing():
    first, other = tiny_qwen(seed=0)[0], tiny_qwen(seed=1)[0]
    assert tower_digest(first.model.visual) != tower_digest(other.model.visual)
    assert tower_digest(first.model.visual) == tower_digest(tiny_qwen(seed=0)[0].model.visual)
    pixels, grids = some_images(1)
    expected = other.model.visual(pixels, grid_thw=grids).pooler_output.detach()
    cache = VisionCache()
    freeze_vision(first, cache)
    freeze_vision(other, cache)
    first.model.visual(pixels, grid_thw=grids)
    torch.testing.assert_close(
        other.model.visual(pixels, grid_thw=grids).pooler_output, expected, atol=1e-5, rtol=0
    )
    assert len(cache) == 2


def test_a_model_without_the_family_s_tower_is_refused():
    with pytest.raises(ValueError, match=r"no model\.visual"):
        freeze_vision(torch.nn.Linear(2, 2))
