"""How often the box follows when the last place of a reasoning is moved to another object.

The miniature's reference model answers validation samples greedily. In each trace the last place is
replaced by the centre of another object, chosen at random, and the model continues from there. A
box follows if its IoU with that object is above 0.5. The same is asked with the reasoning unedited,
which has to give the same answer.

    python benchmarks/bench_edited_reasoning.py
"""

import math
import random
from dataclasses import replace

from egm_lib.boxes import Box, BoxFrame, convert, iou
from egm_lib.inference.engine import Answer, Request, begun_reasoning
from egm_lib.inference.transformers_engine import TransformersEngine
from egm_lib.mini.world import recipes, samples
from egm_lib.parsing import parse_completion
from egm_lib.profile import load_profile
from egm_lib.viewer.steps import places

SAMPLES = 300
FAR_PX = 20  # so far from the last place lies the object that is put in


def main() -> None:
    profile = load_profile("mini")
    reference = profile.models.reference
    sampling = replace(profile.generation.sampling, temperature=0.0)
    engine = TransformersEngine(
        reference.location, reference.family, reference.dtype, batch_size=16
    )
    frame, chosen = engine.family.frame, random.Random(0)

    def box_of(answer: Answer, image_wh: tuple[int, int]) -> Box | None:
        return parse_completion(answer.raw_answer, frame=frame, image_wh=image_wh).box

    drawn = [
        (scene, row)
        for scene, _, rows, _ in samples(recipes()["validation.jsonl"], SAMPLES)
        for row in rows
    ]
    asked = [
        Request(scene.image(), engine.family.prompt(row["expression"], row["task"]))
        for scene, row in drawn
    ]
    unedited, edited, wanted = [], [], []
    for (scene, row), request, answer in zip(
        drawn, asked, engine.answer(asked, sampling), strict=True
    ):
        image_wh = (row["width"], row["height"])
        trace = answer.raw_answer.partition("</think>")[0].removeprefix("<think>").strip()
        steps = places(trace, frame=frame, image_wh=image_wh)
        others = [
            thing
            for thing in scene.things
            if steps
            and thing.visible_box_px
            and math.dist(thing.centre_px, steps[-1].point) > FAR_PX
        ]
        if not others:
            continue
        other, last = chosen.choice(others), steps[-1]
        point = convert((*other.centre_px, *other.centre_px), BoxFrame.PIXEL, frame, image_wh)
        x, y = (20 * round(side / 20) for side in point[:2])  # as the miniature writes places
        changed = f"{trace[: last.start]}at {x} {y}{trace[last.end :]}"
        unedited.append(replace(request, begun=begun_reasoning(engine.family, trace)))
        edited.append(replace(request, begun=begun_reasoning(engine.family, changed)))
        wanted.append((other.visible_box_px, box_of(answer, image_wh), image_wh))
    same = follow = stay = 0
    for (target, first, image_wh), again, moved in zip(
        wanted,
        engine.answer(unedited, sampling),
        engine.answer(edited, sampling),
        strict=True,
    ):
        box = box_of(moved, image_wh)
        same += box_of(again, image_wh) == first
        if box and iou(box, target) > 0.5:
            follow += 1
        elif box and first and iou(box, first) > 0.5:
            stay += 1
    print(f"{len(wanted)} of {len(drawn)} traces name a place that can be moved")
    print(f"unedited: the same box in {same}")
    neither = len(wanted) - follow - stay
    print(f"edited: the box follows in {follow}, stays in {stay}, is elsewhere in {neither}")


if __name__ == "__main__":
    main()
