"""The miniature world: scenes, expressions, a teacher that knows them, tiny checkpoints."""
