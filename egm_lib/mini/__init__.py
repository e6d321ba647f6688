"""The miniature world: drawn scenes, referring expressions, a teacher that sees the scene graph,
tiny checkpoints.
"""
