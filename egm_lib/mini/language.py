"""Referring expressions of the miniature world, what they refer to, and the reasoning that finds
it.

A Query is a small tree: which kind of thing, how it is picked, and relative to which other queries.
It can state itself in words (with paraphrases), find its thing (None if it fits none or several, or
fits by too small a margin), and write the steps that lead there. Places are visible centres on the
0..1000 grid of egm_lib.mini.pretraining.vision.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from random import Random

from egm_lib.curation.directions import DEGREES, extensions
from egm_lib.mini.grid import GRID_1000, grid_length, level
from egm_lib.mini.scenes import COLOURS, SHAPES, Scene, Thing

ORDER_MARGIN_PX = 5.0  # two places closer than this along an axis have no order
SIDE_MARGIN_PX = 6.0  # "left of" wants at least this offset, and its absence in all others
DISTANCE_MARGIN_PX = 7.0
SIZE_RATIO = 1.13  # of the sides: an area 1.28 times as large
TINY_PX = 10.0
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")
AXES = ("left", "right", "top", "bottom", "largest", "smallest")
SIDES = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
EDGE = {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "bottommost"}
PARAPHRASES = {
    "edge": ("{edge} {kind}", "{kind} furthest to the {axis}", "{kind} at the far {axis}"),
    "ordinal": (
        "{ordinal} {kind} from the {axis}",
        "{kind} that is {ordinal} from the {axis}",
        "from the {axis} the {ordinal} {kind}",
    ),
    "extreme": ("{axis} {kind}", "{kind} that is the {axis} one"),
    "size": ("{ordinal} {axis} {kind}", "{kind} that is {ordinal} {axis}"),
    "side": (
        "{kind} {side} the {anchor}",
        "{kind} that is {side} the {anchor}",
        "the {kind} {side} the {anchor}",
    ),
    "near": (
        "{kind} nearest to the {anchor}",
        "{kind} closest to the {anchor}",
        "the {anchor} has this {kind} closest",
    ),
    "far": ("{kind} farthest from the {anchor}", "{kind} most distant from the {anchor}"),
    "between": (
        "{kind} between the {anchor} and the {other}",
        "{kind} in the middle of the {anchor} and the {other}",
    ),
    "side_rank": (
        "{ordinal} {kind} {side} the {anchor}",
        "{side} the {anchor} the {ordinal} {kind}",
    ),
}
# How a trace reasons: step by step; only with what it comes to; or not at all.
WAYS = ("worked", "concluding", "restating")
MAX_CANDIDATES = 7  # keeps traces short enough for a tiny model
# One token each
TOWARDS = {"upward": "up", "downward": "down", "to the left": "left", "to the right": "right"}


@dataclass(frozen=True)
class Kind:
    """Colour, shape, or both."""

    colour: str | None
    shape: str | None

    def name(self, plural: bool = False) -> str:
        noun = self.shape or "thing"
        ending = ("es" if noun == "cross" else "s") if plural else ""
        return f"{self.colour} {noun}{ending}" if self.colour else noun + ending

    def members(self, scene: Scene) -> list[int]:
        """Indices of the visible things of this kind, from left to right."""
        return scene.members.get((self.colour, self.shape), [])


def place(thing: Thing) -> str:
    """Where a thing is, as traces say it: `at 420 300`."""
    x, y = thing.centre_px
    return f"at {level(x) * GRID_1000} {level(y) * GRID_1000}"


def sort_value(thing: Thing, axis: str) -> float:
    """What things are sorted by, ascending, when they are counted from an end of AXES."""
    x, y = thing.centre_px
    return {
        "left": x,
        "right": -x,
        "top": y,
        "bottom": -y,
        "largest": -thing.side_px,
        "smallest": thing.side_px,
    }[axis]


def clear_order(values: list[float], axis: str, upto: int) -> bool:
    """Whether the first `upto` of the sorted values are told apart from each other and from the
    next.
    """
    for a, b in zip(values[:upto], values[1 : upto + 1], strict=False):
        if axis in ("largest", "smallest"):
            if max(abs(a), abs(b)) / max(min(abs(a), abs(b)), 1e-6) < SIZE_RATIO:
                return False
        elif b - a < ORDER_MARGIN_PX:
            return False
    return True


def _is_beside(thing: Thing, anchor: Thing, side: str) -> bool | None:
    """Whether the thing lies on that side of the anchor; None when it is too close to call."""
    offset = sort_value(anchor, side) - sort_value(thing, side)
    if abs(offset) < SIDE_MARGIN_PX:
        return None
    return offset > 0


def _distance(thing: Thing, point: tuple[float, float]) -> float:
    return math.dist(thing.centre_px, point)


@dataclass(frozen=True)
class Query:
    """One way to pick a thing. how: plain | rank | side | near | far | between | side_rank."""

    kind: Kind
    how: str = "plain"
    axis: str = ""  # of AXES for rank, of SIDES for side and side_rank
    number: int = 1
    anchors: tuple[Query, ...] = ()

    @property
    def hops(self) -> int:
        """Serial selections beyond the first: anchors that must themselves be selected count."""
        return (self.how != "plain") + sum(a.hops for a in self.anchors)

    @property
    def prompt_kind(self) -> str:
        """The kind of prompt, as results are broken down by it."""
        if self.hops >= 3:
            return "chain-3"
        if self.hops == 2:
            return "chain-2"
        if self.how == "rank":
            size = self.axis in ("largest", "smallest")
            return ("size-" if size else "") + ("superlative" if self.number == 1 else "ordinal")
        return {
            "side": "relational",
            "far": "nearest",
            "near": "nearest",
            "side_rank": "relational-ordinal",
        }.get(self.how, self.how)

    @property
    def uses_location(self) -> bool:
        """Whether left, right, above or below occur (RefCOCO+ forbids them)."""
        here = self.how in ("side", "side_rank") or self.how == "rank" and self.axis in SIDES
        return here or any(a.uses_location for a in self.anchors)

    def words(self, rng: Random, nested: bool = False) -> str:
        """The expression, one of its paraphrases; nested: said as part of another expression."""
        fill = {
            "kind": self.kind.name(),
            "axis": self.axis,
            "ordinal": ORDINALS[self.number - 1],
            "side": SIDES.get(self.axis),
            "edge": EDGE.get(self.axis),
        }
        for name, anchor in zip(("anchor", "other"), self.anchors, strict=False):
            fill[name] = anchor.words(rng, nested=True)
        how = self.how
        if how == "plain":
            return self.kind.name()
        if how == "rank":
            size = self.axis in ("largest", "smallest")
            how = (
                ("extreme" if size else "edge")
                if self.number == 1
                else ("size" if size else "ordinal")
            )
        forms = PARAPHRASES[how]
        if nested or any(a.how != "plain" for a in self.anchors):
            forms = [
                f
                for f in forms
                if f.startswith("{") and "{side}" not in f[:6] and "{anchor}" not in f[:8]
            ]
        return rng.choice(forms).format(**fill)

    def _anchor_things(self, scene: Scene) -> list[Thing] | None:
        found = [a.find(scene) for a in self.anchors]
        return None if None in found else [scene.things[i] for i in found]

    def _reference_point(self, anchors: list[Thing]) -> tuple[float, float]:
        points = [a.centre_px for a in anchors]
        return sum(p[0] for p in points) / len(points), sum(p[1] for p in points) / len(points)

    def _candidates(self, scene: Scene, anchors: list[Thing]) -> list[int]:
        return [
            i for i in self.kind.members(scene) if not any(scene.things[i] is a for a in anchors)
        ]

    def find(self, scene: Scene) -> int | None:
        """Index of the one thing meant, or None when there is none, or none by a clear margin."""
        anchors = self._anchor_things(scene)
        if anchors is None or len({id(a) for a in anchors}) < len(anchors):
            return None
        members = self._candidates(scene, anchors)
        things = scene.things
        if self.how == "plain":
            return members[0] if len(members) == 1 else None
        if not 2 <= len(members) <= MAX_CANDIDATES:
            return None  # the selection would be idle, or too long to write out
        if self.how in ("rank", "side_rank"):
            if self.how == "side_rank":
                beside = [_is_beside(things[i], anchors[0], self.axis) for i in members]
                if None in beside:
                    return None
                members = [i for i, yes in zip(members, beside, strict=True) if yes]
            axis = self.axis
            if self.how == "side_rank":  # counted outwards from the anchor
                axis = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[axis]
            ordered = sorted(members, key=lambda i: sort_value(things[i], axis))
            values = [sort_value(things[i], axis) for i in ordered]
            if self.number > len(ordered) or not clear_order(values, axis, self.number):
                return None
            return ordered[self.number - 1]
        if self.how == "side":
            beside = [_is_beside(things[i], anchors[0], self.axis) for i in members]
            return (
                members[beside.index(True)]
                if None not in beside and beside.count(True) == 1
                else None
            )
        point = self._reference_point(anchors)
        ordered = sorted(
            members, key=lambda i: _distance(things[i], point), reverse=self.how == "far"
        )
        best, next_best = (_distance(things[i], point) for i in ordered[:2])
        if abs(next_best - best) < DISTANCE_MARGIN_PX:
            return None
        if self.how == "between" and best > 0.35 * math.dist(
            anchors[0].centre_px, anchors[1].centre_px
        ):
            return None
        return ordered[0]

    def steps(self, scene: Scene) -> str:
        """The reasoning that finds the thing, sentence by sentence; the last place named is the
        answer's.
        """
        found = self.find(scene)
        if found is None:
            raise ValueError(f"no trace for {self}: it has no unique thing in this scene")
        things, target = scene.things, scene.things[found]
        if self.how == "plain":
            return f"the {self.kind.name()} is {place(target)}."
        anchors = self._anchor_things(scene) or []
        before = " ".join(a.steps(scene) for a in self.anchors)
        members = self._candidates(scene, anchors)
        kinds = self.kind.name(plural=True)
        if self.how in ("rank", "side_rank"):
            axis, heading = self.axis, f"{kinds} from the {self.axis}:"
            if self.how == "side_rank":
                members = [i for i in members if _is_beside(things[i], anchors[0], axis)]
                heading = f"{kinds} {SIDES[axis]} it:"
                axis = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[axis]
            ordered = sorted(members, key=lambda i: sort_value(things[i], axis))[: self.number]
            size = axis in ("largest", "smallest")
            listed = ", ".join(
                f"{ORDINALS[n]} {place(things[i])}"
                + (f" size {grid_length(things[i].side_px)}" if size else "")
                for n, i in enumerate(ordered)
            )
            return f"{before} {heading} {listed}.".strip()
        where = {
            "side": f"{SIDES.get(self.axis)} it",
            "near": "nearest to it",
            "far": "farthest from it",
            "between": "nearest to the middle",
        }[self.how]
        if self.how == "between":
            x, y = self._reference_point(anchors)
            before += f" the middle is at {level(x) * GRID_1000} {level(y) * GRID_1000}."
        return f"{before} the {self.kind.name()} {where} is {place(target)}."


def extension(thing: Thing) -> list[tuple[str, str]]:
    """(direction, degree) by which the full box reaches beyond the visible one, in the miniature's
    words.
    """
    return [
        (TOWARDS[way], degree)
        for way, degree in extensions(thing.visible_box_px, thing.full_box_px)
    ]


def hidden_by(scene: Scene, index: int) -> Thing | None:
    """The thing drawn later whose full box covers most of the hidden part, or None."""
    target = scene.things[index].full_box_px
    best, most = None, 0.0
    for other in scene.things[index + 1 :]:
        box = other.full_box_px
        area = max(0.0, min(target[2], box[2]) - max(target[0], box[0])) * max(
            0.0, min(target[3], box[3]) - max(target[1], box[1])
        )
        if area > most:
            best, most = other, area
    return best


def amodal_steps(query: Query, scene: Scene, index: int) -> str:
    """Reasoning to the full box: find the thing, name what hides it, say where and how much it goes
    on.
    """
    thing = scene.things[index]
    cover = hidden_by(scene, index)
    v = [level(c) * GRID_1000 for c in thing.visible_box_px]
    text = f"{query.steps(scene)} it is seen from {v[0]} {v[1]} to {v[2]} {v[3]}."
    parts = extension(thing)
    if cover is not None and parts:
        extend = ", ".join(f"{direction} {degree}" for direction, degree in parts)
        return f"{text} the {Kind(cover.colour, cover.shape).name()} hides it. extend {extend}."
    return f"{text} nothing hides it."


_PLACE = re.compile(r"\bat \d+ \d+")
_HIDDEN_PART = re.compile(r"(?:extend [^.]+|nothing hides it)\.$")


def retell(worked: str, expression: str, way: str) -> str:
    """A worked trace in one of WAYS: "concluding" keeps the last place only, "restating" none.

    What an amodal trace says of the hidden part stays, as the curation prompt asks for it.
    """
    if way == "worked":
        return worked
    if way == "concluding":
        told = f"{expression} is {_PLACE.findall(worked)[-1]}."
    elif way == "restating":
        told = f"it is {expression}."
    else:
        raise ValueError(f"unknown way {way!r}: use one of {', '.join(WAYS)}")
    hidden_part = _HIDDEN_PART.search(worked)
    return f"{told} {hidden_part[0]}" if hidden_part else told


def way_of(reasoning: str | None, expression: str) -> str | None:
    """In which of WAYS a text reasons, told by its form; nothing is said on whether it is right.

    None if there is no reasoning, as in a direct answer.
    No place is restating. One place, nothing listed, is concluding, except for an expression that
    needs no steps: its worked trace has that form too, and begins with "the".
    """
    text = (reasoning or "").strip()
    if not text:
        return None
    places = _PLACE.findall(text)
    if not places:
        return "restating"
    if len(places) > 1 or ":" in text or text.startswith(f"the {expression} is"):
        return "worked"
    return "concluding"


def _pick_kind(rng: Random, scene: Scene, sizes: range) -> Kind | None:
    """A kind with that many members: mostly colour and shape, sometimes only one of the two."""
    wanted = rng.choices(("both", "shape", "colour"), (0.72, 0.16, 0.12))[0]
    fits = [
        key
        for key, found in scene.members.items()
        if len(found) in sizes
        and wanted == ("shape" if key[0] is None else "colour" if key[1] is None else "both")
    ]
    return Kind(*rng.choice(fits)) if fits else None


def propose(rng: Random, scene: Scene, hops: int, how: str | None = None) -> Query | None:
    """A random query with that many selections; it need not fit. None if the scene has nothing
    for it.

    how: as Query.how, for one selection; deeper queries draw their own.
    """
    if hops == 0:
        kind = _pick_kind(rng, scene, range(1, 2))
        return kind and Query(kind)
    kind = _pick_kind(rng, scene, range(2, MAX_CANDIDATES + 1))
    if kind is None:
        return None
    if how is None:
        weights = (
            (0.25, 0.1, 0.2, 0.05, 0.15, 0.25) if hops == 1 else (0, 0.14, 0.3, 0.06, 0.12, 0.38)
        )
        how = rng.choices(("rank", "side", "near", "far", "between", "side_rank"), weights)[0]
    if how == "rank":
        return Query(
            kind, "rank", rng.choice(AXES), rng.randint(1, min(len(kind.members(scene)), 5))
        )
    anchor = propose(rng, scene, hops - 1, "rank" if hops == 2 and rng.random() < 0.6 else None)
    other = propose(rng, scene, 0) if how == "between" else None
    if anchor is None or how == "between" and other is None:
        return None
    beside = how in ("side", "side_rank")
    number = rng.randint(1, min(len(kind.members(scene)), 4)) if how == "side_rank" else 1
    return Query(
        kind,
        how,
        rng.choice(list(SIDES)) if beside else "",
        number,
        (anchor, other) if other else (anchor,),
    )


def sample_query(
    rng: Random,
    scene: Scene,
    hops: int,
    *,
    location: bool = True,
    how: str | None = None,
    tries: int = 40,
) -> tuple[Query, int] | None:
    """A query with that many selections that fits exactly one thing of the scene, and that thing's
    index.
    """
    for attempt in range(tries):
        # Ways that seldom fit get as many tries as the others
        if how is None and hops == 1 and attempt % 10 == 0:
            wanted = rng.choices(
                ("rank", "side", "near", "far", "between", "side_rank"), (4, 1, 3, 1, 2, 3)
            )[0]
        query = propose(rng, scene, hops, how or (wanted if hops == 1 else None))
        if query is None or query.uses_location and not location:
            continue
        found = query.find(scene)
        if found is not None and scene.things[found].side_px >= 5:
            return query, found
    return None


def num_lookalikes(query: Query, scene: Scene, index: int) -> int:
    """Other things of the kind the expression names."""
    return sum(i != index for i in query.kind.members(scene))


WORDS = sorted(
    set(
        " ".join(
            [
                *COLOURS,
                *SHAPES,
                *(s + ("es" if s == "cross" else "s") for s in SHAPES),
                "thing things",
                *ORDINALS,
                *AXES,
                *SIDES.values(),
                *EDGE.values(),
                *(f for forms in PARAPHRASES.values() for f in forms),
                *(word for _, word in DEGREES),
                "above below left right up down",
                "the is at from so size distance middle it seen to hides nothing extend",
                "Locate Detect List Describe What all in picture amodally",
            ]
        )
        .replace("{", " ")
        .replace("}", " ")
        .split()
    )
    - {"kind", "axis", "ordinal", "edge", "side", "anchor", "other"}
)
