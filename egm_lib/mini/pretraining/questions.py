"""Questions and answers that the miniature's bases learn from."""

from __future__ import annotations

from random import Random

from egm_lib.mini.grid import GRID_1000, grid_length, level
from egm_lib.mini.language import (
    AXES,
    MAX_CANDIDATES,
    ORDINALS,
    Kind,
    Query,
    clear_order,
    place,
    sample_query,
    sort_value,
)
from egm_lib.mini.scenes import SIZE_PX, Scene
from egm_lib.prompts import FAMILIES

# Describing and finding come first; without them selection is never learned
EASY_STEPS = 850
# From this step on, places are also asked for and stated in words, as reasoning will need them
WORDED_STEPS = 6000
FAMILY = FAMILIES["qwen3-vl"]
IMAGE_WH = (SIZE_PX, SIZE_PX)


def box_text(box_px) -> str:
    """`[120, 300, 260, 420]` on the answer grid."""
    return "[" + ", ".join(str(level(v) * GRID_1000) for v in box_px) + "]"


def ordered_list(scene: Scene, kind: Kind, axis: str) -> str | None:
    """`first at 120 300, second at ...`: all of a kind in order; None if that is unclear."""
    things = sorted(
        (scene.things[i] for i in kind.members(scene)), key=lambda t: sort_value(t, axis)
    )
    if (
        not things
        or len(things) > len(ORDINALS)
        or not clear_order([sort_value(t, axis) for t in things], axis, 9)
    ):
        return None
    size = axis in ("largest", "smallest")
    return (
        ", ".join(
            f"{ORDINALS[n]} {place(t)}" + (f" size {grid_length(t.side_px)}" if size else "")
            for n, t in enumerate(things)
        )
        + "."
    )


def description(scene: Scene, axis: str) -> str:
    """`red circle at 120 300, blue star at 200 480, ...`: everything there is, in order."""
    seen = sorted(
        (t for t in scene.things if t.visible_box_px is not None), key=lambda t: sort_value(t, axis)
    )
    return ", ".join(f"{Kind(t.colour, t.shape).name()} {place(t)}" for t in seen) + "."


def locate(
    query: Query, scene: Scene, index: int, rng: Random, task: str = "vanilla"
) -> tuple[str, str]:
    """(prompt, direct answer) for an expression."""
    thing = scene.things[index]
    box = thing.full_box_px if task == "amodal" else thing.visible_box_px
    return FAMILY.prompt(query.words(rng), task), FAMILY.answer(
        box, IMAGE_WH, None, None, grid=GRID_1000
    )


def worded(scene: Scene, rng: Random) -> list[tuple[str, str, str]]:
    """(group, prompt, answer): where a thing is, what is at a place, and its box."""
    found = []
    for drawn in (sample_query(rng, scene, 0), sample_query(rng, scene, 0)):
        if drawn:
            found.append(
                (
                    "where",
                    f"Describe the {drawn[0].kind.name()}.",
                    "</think>\n\n" + drawn[0].steps(scene),
                )
            )
    seen = [t for t in scene.things if t.visible_box_px is not None]
    for thing in rng.sample(seen, min(2, len(seen))):
        answer = FAMILY.answer(thing.visible_box_px, IMAGE_WH, None, None, grid=GRID_1000)
        found.append(("place", FAMILY.prompt(f"thing {place(thing)}", "vanilla"), answer))
    thing = rng.choice(seen)
    found.append(
        (
            "name",
            f"What is {place(thing)}?",
            f"</think>\n\n{Kind(thing.colour, thing.shape).name()}.",
        )
    )
    return found


def questions(scene: Scene, rng: Random, step: int) -> list[tuple[str, str, str]]:
    """(group, prompt, answer) for one image at a step of the training, in random order."""
    easy, in_words = step < EASY_STEPS, step >= WORDED_STEPS
    found: list[tuple[str, str, str]] = []
    kinds = [Kind(*key) for key, members in scene.members.items() if len(members) <= MAX_CANDIDATES]
    crowded = [k for k in kinds if len(k.members(scene)) > 1] or kinds
    for side in rng.sample(("left", "right", "top", "bottom"), 3 if easy else 1):
        found.append(
            (
                "describe",
                f"Describe the picture from the {side}.",
                "</think>\n\n" + description(scene, side),
            )
        )
    for number in range(2):
        kind = rng.choice(crowded if number else kinds)
        boxes = '},\n\t{"bbox_2d": '.join(
            box_text(scene.things[i].visible_box_px) for i in kind.members(scene)
        )
        prompt = (
            f"Detect all {kind.name(plural=True)}, output their bbox coordinates using JSON format."
        )
        found.append(
            ("detect", prompt, f'</think>\n\n```json\n[\n\t{{"bbox_2d": {boxes}}}\n]\n```')
        )
    for _ in range(1 if easy else 3):
        kind, axis = rng.choice(crowded), rng.choice(AXES)
        answer = ordered_list(scene, kind, axis)
        if answer:
            heading = f"{kind.name(plural=True)} from the {axis}"
            told = f"{heading}: {answer}" if in_words else answer
            found.append(("list", f"List all {heading}.", "</think>\n\n" + told))
    seen = [i for i, t in enumerate(scene.things) if t.visible_box_px is not None]
    thing = scene.things[rng.choice(seen)]
    name = Kind(thing.colour, thing.shape).name()
    found.append(
        ("name", f"What is in {box_text(thing.visible_box_px)}?", "</think>\n\n" + name + ".")
    )
    for hops in (0, 0, 0) if easy else (0, 0, 1, 1, 1, 2, 2, 3):
        drawn = sample_query(rng, scene, hops)
        if drawn:
            found.append((drawn[0].prompt_kind, *locate(*drawn[:1], scene, drawn[1], rng)))
    found += worded(scene, rng) if in_words else []
    hidden = [i for i in seen if scene.things[i].visible_share < 0.98]
    for _ in range(0 if easy else 2):
        drawn = sample_query(rng, scene, rng.randrange(3), tries=30)
        if drawn and (not hidden or drawn[1] in hidden or rng.random() < 0.3):
            found.append(("amodal", *locate(*drawn[:1], scene, drawn[1], rng, "amodal")))
    rng.shuffle(found)
    return found
