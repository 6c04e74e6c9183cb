"""A suite of a user's whose module raises when it is imported."""

raise RuntimeError("the licence has expired")
