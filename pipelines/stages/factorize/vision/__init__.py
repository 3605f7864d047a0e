"""Vision tower and projector: a stage of its own, whose ranks are planned."""
