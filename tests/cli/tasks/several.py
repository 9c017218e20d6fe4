"""Two tasks, one of which must be given an argument."""

from shapes import Points


class Wide(Points):
    """Wide points."""

    def __init__(self, width, **rest):
        super().__init__(hidden=width, **rest)


class Narrow(Points):
    def __init__(self):
        super().__init__(hidden=2)
