"""A process that is killed at a write, played within the process of a test."""

import itertools

from ntkgen.files.folder import LocalFolder


class Killed(BaseException):
    """A kill of the process, at a write that is not made."""


def was_killed(run, moment, monkeypatch):
    """Call a function up to some write, counted from 1. Return whether there were that many writes."""
    count = itertools.count(1)

    def write(self, key, data, plain=LocalFolder.write):
        if next(count) == moment:
            raise Killed
        plain(self, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "write", write)
        try:
            run()
        except Killed:
            return True
    return False
