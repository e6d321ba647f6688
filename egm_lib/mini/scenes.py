"""Scenes of the miniature world: coloured shapes on a textured ground, with exact boxes.

Boxes are xyxy in pixels of the image (BoxFrame.PIXEL). A scene is a pure function of its random
generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

SIZE_PX = 128
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 40),
    "orange": (244, 140, 20),
    "yellow": (240, 224, 48),
    "green": (40, 172, 64),
    "blue": (48, 88, 228),
    "purple": (156, 56, 188),
    "white": (246, 246, 246),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Images are drawn at twice the size and averaged down, for smooth edges
SUPERSAMPLING = 2

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Thing:
    """One shape. full_box_px ignores occlusion; visible_box_px is None if nothing can be seen."""

    colour: str
    shape: str
    full_box_px: Box
    visible_box_px: Box | None = None
    visible_share: float = 1.0

    @cached_property
    def centre_px(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.visible_box_px or self.full_box_px
        return (x1 + x2) / 2, (y1 + y2) / 2

    @cached_property
    def side_px(self) -> float:
        """Side of the square with the visible box's area: the size that expressions compare."""
        x1, y1, x2, y2 = self.visible_box_px or self.full_box_px
        return math.sqrt((x2 - x1) * (y2 - y1))


@dataclass(frozen=True)
class Scene:
    """Things in drawing order (the last is on top), and the seed of the ground's texture."""

    things: tuple[Thing, ...]
    ground_seed: int

    @cached_property
    def members(self) -> dict[tuple[str | None, str | None], list[int]]:
        """Indices of the visible things from left to right, by (colour, shape).

        Keys with None for one of the two hold the things of one colour or of one shape.
        """
        found: dict[tuple[str | None, str | None], list[int]] = {}
        seen = [i for i, t in enumerate(self.things) if t.visible_box_px is not None]
        for i in sorted(seen, key=lambda i: self.things[i].centre_px):
            colour, shape = self.things[i].colour, self.things[i].shape
            for key in ((colour, shape), (colour, None), (None, shape)):
                found.setdefault(key, []).append(i)
        return found

    # What a playground arranges (`Arrangement` in egm_lib/viewer/playground.py)

    @property
    def objects(self) -> list[tuple[str, Box]]:
        """Name and full box (px) of every thing, in drawing order."""
        return [(f"{thing.colour} {thing.shape}", thing.full_box_px) for thing in self.things]

    def image(self) -> Image.Image:
        """The scene's RGB image, 128 x 128."""
        return render(self)

    def moved(self, number: int, by_px: tuple[float, float]) -> Scene:
        """The scene with one thing moved by whole pixels, as far as it stays on the image."""
        x1, y1, x2, y2 = self.things[number].full_box_px
        dx = round(min(max(by_px[0], -x1), SIZE_PX - x2))
        dy = round(min(max(by_px[1], -y1), SIZE_PX - y2))
        thing = replace(self.things[number], full_box_px=(x1 + dx, y1 + dy, x2 + dx, y2 + dy))
        things = (*self.things[:number], thing, *self.things[number + 1 :])
        return with_visibility(Scene(things, self.ground_seed))


def _outline(shape: str, box: Box) -> list[tuple[float, float]]:
    x1, y1, x2, y2 = box
    cx, w, h = (x1 + x2) / 2, x2 - x1, y2 - y1
    if shape == "triangle":
        return [(cx, y1), (x2, y2), (x1, y2)]
    if shape == "cross":
        a, b = w / 3, h / 3
        xs, ys = (x1, x1 + a, x2 - a, x2), (y1, y1 + b, y2 - b, y2)
        columns = (1, 2, 2, 3, 3, 2, 2, 1, 1, 0, 0, 1)
        rows = (0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 1, 1)
        return [(xs[i], ys[j]) for i, j in zip(columns, rows, strict=True)]
    points = []  # a five-pointed star, stretched to fill its box
    for i in range(10):
        radius = 1.0 if i % 2 == 0 else 0.42
        angle = -math.pi / 2 + i * math.pi / 5
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    left, right = min(p[0] for p in points), max(p[0] for p in points)
    top, bottom = min(p[1] for p in points), max(p[1] for p in points)
    return [
        (x1 + (px - left) / (right - left) * w, y1 + (py - top) / (bottom - top) * h)
        for px, py in points
    ]


def _draw(draw: ImageDraw.ImageDraw, shape: str, box: Box, fill, hole=None) -> None:
    """Draw one shape; box in the canvas's own pixels, its right and lower edges exclusive."""
    x1, y1, x2, y2 = box
    inner = (x1, y1, x2 - 1, y2 - 1)  # Pillow includes the last pixel
    if shape == "square":
        draw.rectangle(inner, fill=fill)
    elif shape == "circle":
        draw.ellipse(inner, fill=fill)
    elif shape == "ring":
        width = max(2, round(0.24 * min(x2 - x1, y2 - y1)))
        draw.ellipse(inner, outline=fill, width=width)
    else:
        draw.polygon(_outline(shape, inner), fill=fill)


def _ground(seed: int) -> np.ndarray:
    """A dim textured ground, H x W x 3 uint8: a colour ramp, stripes or blotches, and grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:SIZE_PX, 0:SIZE_PX] / SIZE_PX
    base = rng.uniform(50, 120) + rng.uniform(-10, 10, 3)
    kind = rng.integers(3)
    angle, frequency = rng.uniform(0, math.pi), rng.uniform(3, 14)
    along = x * math.cos(angle) + y * math.sin(angle)
    if kind == 0:
        pattern = along * 2 - 1
    elif kind == 1:
        pattern = np.sin(2 * math.pi * frequency * along + rng.uniform(0, 6))
    else:
        coarse = rng.normal(size=(8, 8))
        pattern = np.kron(coarse, np.ones((SIZE_PX // 8, SIZE_PX // 8))) * 0.6
    image = (
        base
        + rng.uniform(6, 18) * pattern[..., None]
        + rng.normal(0, rng.uniform(1, 5), (SIZE_PX, SIZE_PX, 1))
    )
    return np.clip(image, 0, 255).astype(np.uint8)


def render(scene: Scene) -> Image.Image:
    """The scene's RGB image, 128 x 128."""
    side = SIZE_PX * SUPERSAMPLING
    canvas = Image.fromarray(_ground(scene.ground_seed)).resize((side, side), Image.NEAREST)
    draw = ImageDraw.Draw(canvas)
    shade = np.random.default_rng(scene.ground_seed + 1)
    for thing in scene.things:
        jitter = shade.integers(-14, 15, 3)
        fill = tuple(int(v) for v in np.clip(np.array(COLOURS[thing.colour]) + jitter, 0, 255))
        _draw(draw, thing.shape, tuple(v * SUPERSAMPLING for v in thing.full_box_px), fill)
    return canvas.resize((SIZE_PX, SIZE_PX), Image.BOX)


def with_visibility(scene: Scene) -> Scene:
    """The scene with the visible box and share of every thing, measured on a drawing of the scene.

    The resolution is half a pixel.
    """
    side = SIZE_PX * SUPERSAMPLING
    ids = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(ids)
    areas = []
    for number, thing in enumerate(scene.things, start=1):
        box = tuple(v * SUPERSAMPLING for v in thing.full_box_px)
        _draw(draw, thing.shape, box, number)
        x1, y1, x2, y2 = (int(v) for v in box)
        areas.append(int(np.count_nonzero(np.asarray(ids.crop((x1, y1, x2, y2))) == number)))
    top = np.asarray(ids)
    things = []
    for number, (thing, area) in enumerate(zip(scene.things, areas, strict=True), start=1):
        x1, y1, x2, y2 = (int(v * SUPERSAMPLING) for v in thing.full_box_px)
        seen = top[y1:y2, x1:x2] == number
        count = int(np.count_nonzero(seen))
        if count == 0:
            things.append(replace(thing, visible_box_px=None, visible_share=0.0))
            continue
        if count == area:
            things.append(replace(thing, visible_box_px=thing.full_box_px, visible_share=1.0))
            continue
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        box = (x1 + columns[0], y1 + rows[0], x1 + columns[-1] + 1, y1 + rows[-1] + 1)
        visible = tuple(float(v) / SUPERSAMPLING for v in box)
        things.append(replace(thing, visible_box_px=visible, visible_share=count / area))
    return replace(scene, things=tuple(things))


def _overlap(a: Box, b: Box, gap: float) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def _place(
    rng: np.random.Generator, side_px: int, taken: list[Box], gap: float = 2.0
) -> Box | None:
    width = side_px
    height = int(np.clip(round(side_px * rng.uniform(0.85, 1.18)), 6, 40))
    for _ in range(40):
        x = int(rng.integers(1, SIZE_PX - width))
        y = int(rng.integers(1, SIZE_PX - height))
        box = (float(x), float(y), float(x + width), float(y + height))
        if not any(_overlap(box, other, gap) for other in taken):
            return box
    return None


def _occluder(rng: np.random.Generator, target: Box) -> Box | None:
    """A box in the image that hides a good part of the target, from one side or corner."""
    x1, y1, x2, y2 = target
    side = int(rng.integers(16, 32))
    cover = rng.uniform(0.25, 0.65)
    dx, dy = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)][rng.integers(8)]
    w, h = x2 - x1, y2 - y1
    cx = (x1 + x2) / 2 + dx * (w / 2 + side / 2 - cover * w) + (0 if dx else rng.uniform(-4, 4))
    cy = (y1 + y2) / 2 + dy * (h / 2 + side / 2 - cover * h) + (0 if dy else rng.uniform(-4, 4))
    box = (round(cx - side / 2), round(cy - side / 2), round(cx + side / 2), round(cy + side / 2))
    if min(box[:2]) < 0 or max(box[2:]) > SIZE_PX:
        return None
    return tuple(float(v) for v in box)


def sample_scene(rng: np.random.Generator, *, occlusion: float = 0.06, tiny: float = 0.01) -> Scene:
    """A random scene: one or two crowded kinds (look-alikes), distractors, and 5 things at least.

    occlusion: chance of each thing to be partly hidden by another one.
    tiny: chance of each thing to be 7 px wide.
    """
    while True:
        scene = _try_scene(rng, occlusion, tiny)
        if len(scene.things) >= 5:
            return scene


def _try_scene(rng: np.random.Generator, occlusion: float, tiny: float) -> Scene:
    def random_kind() -> tuple[str, str]:
        return str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))

    crowd = random_kind()
    wanted = [crowd] * int(
        rng.choice([1, 2, 3, 4, 5, 6, 7], p=[0.06, 0.1, 0.2, 0.22, 0.18, 0.14, 0.1])
    )
    second = random_kind()
    if second != crowd and rng.random() < 0.6:
        wanted += [second] * int(rng.integers(2, 4))
    for _ in range(int(rng.integers(2, 6))):
        colour, shape = random_kind()
        likeness = rng.random()
        if likeness < 0.3:
            colour = crowd[0]
        elif likeness < 0.6:
            shape = crowd[1]
        if (colour, shape) != crowd:
            wanted.append((colour, shape))
    wanted = wanted[:12]

    things: list[Thing] = []
    taken: list[Box] = []
    for colour, shape in wanted:
        side = 7 if rng.random() < tiny else int(rng.integers(14, 33 if len(wanted) < 9 else 28))
        box = _place(rng, side, taken)
        if box is None:
            continue
        taken.append(box)
        things.append(Thing(colour, shape, box))
        if rng.random() < occlusion:
            cover = _occluder(rng, box)
            if cover is not None and not any(_overlap(cover, other, 1.0) for other in taken[:-1]):
                colour, shape = random_kind()
                if (colour, shape) != crowd:
                    taken.append(cover)
                    things.append(Thing(colour, shape, cover))
    return with_visibility(Scene(tuple(things), int(rng.integers(2**31))))
