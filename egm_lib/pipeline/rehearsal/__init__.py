"""Stand-ins for what a paper profile needs and a laptop lacks: checkpoints, annotations, services.

Each has the form of the real thing (token ids, file formats, refusals) and none of its substance:
random weights, drawn images, canned answers. A rehearsal shows that a profile runs, never how well.
"""
