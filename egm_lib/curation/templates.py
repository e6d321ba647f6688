"""The five curation prompts. Content and constraints follow Fig. 8-11 and 13; the wording is ours.

Every template is filled in with `str.format`. Boxes are integers from 0 to 999 unless the template
says pixels. A backslash at the end of a line joins it with the next one: the line breaks that a
service sees are part of a request's key, and stay as they were.
"""

TRACE = """\
You see an image in which one object is marked, so that you know which one is meant.
Somebody else, who sees the same image without any mark, has to find it from this referring \
expression alone:

  "{expression}"

For your information only, it lies at {gt_box} (x1, y1, x2, y2, each from 0 to 999).

Write the visual reasoning that leads from the expression to this object, in one or two sentences.
- Say what to look for and where. Where several objects are alike, say what sets this one apart \
from the others.
- Write as somebody who does not know the answer beforehand and finds it by looking.
- Never mention the mark, its colour, its label or any drawn box, and give no coordinates or \
pixel values.
Answer with the reasoning only."""

AMODAL_EXPRESSION = """\
In this image one object, a {name}, is marked with a box labelled TARGET. Part of it may be \
hidden behind other
things; the box covers all of it, hidden parts included.

Write a referring expression by which somebody who sees the image without the mark finds exactly \
this object.
- It must fit this object and no other. Where there are look-alikes, use an ordinal, a \
superlative, a place or a
  relation.
- Use natural features: kind, colour, material, clothing, what it is doing, what it is next to.
- Lower case, a short phrase in the style of a referring expression, no full sentence, no full stop.
Good: "tiger behind the fallen log"; "second chair from the left"; "the smaller of the two red \
cups".
Bad: "the object in the green box"; "the marked tiger"; "the target" (these mention the mark); \
"a chair" (if there are
several).
Answer with the expression only."""

VERIFY = """\
In this image one region is marked with a box labelled TARGET. A reader who will not see the \
mark gets this
referring expression:

  "{expression}"

Check three things:
1. Does the expression match the object in the TARGET box?
2. Does it fit nothing else in the image?
3. Could the reader, from the expression alone, locate exactly this region?
Answer with one word: YES if all three hold, NO otherwise."""

AMODAL_TRACE = """\
In this image one object is marked twice, so that you know which one is meant: its visible part \
and its complete
extent. Somebody else, who sees the image without any mark, has to find the complete extent, \
hidden parts included, of

  "{expression}"

For your information only: the visible part lies at {modal_box}, the whole object at {gt_box} \
(x1, y1, x2, y2, each
from 0 to 999; a value below 0 or above 999 lies outside the image).
From the visible part the object extends: {directions}.

Write the visual reasoning that leads to the complete extent, in at most five sentences.
- How to locate the object, and what sets it apart from others like it.
- What hides part of it.
- What its complete shape is.
- In which direction or directions, and how far, to extend from the visible part. Use exactly \
these words: {directions}.
- Write as somebody who does not know the answer beforehand. No pixel values, no coordinates, no \
image boundaries, no
  mention of boxes or marks.
Answer with the reasoning only."""

FAILURE = """\
A model was asked to locate an object in this image and failed: its box overlaps the right one \
by less than half.
The right box is drawn in green, labelled "Ground Truth"{prediction_drawn}.

Expression: "{expression}"
Image: {width} x {height} pixels
Ground truth box: {gt_box_px} (x1, y1, x2, y2 in pixels)
Predicted box: {pred_box_px}

What is the main cause of the failure?
- COMPLEX-PROMPT: the expression needs attributes, relations, order or several steps to single \
out the object among
  similar ones, and the model did not follow it.
- AMBIGUOUS-IMAGE: the image or the expression leaves open which object is meant; the predicted \
one is a reasonable
  reading.
- SMALL-OBJECT: the object is so small or so little visible that it can hardly be located.
- GT-ERROR: the ground truth is wrong: its box or the expression does not belong to the object.
- OTHER: none of these.
Answer with one of the five names only."""
