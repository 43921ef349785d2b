"""What transformers announces by its logger is an error here, as Python's warnings are.

It tells of parts that will move or go by ``warning_once``, which pytest's filter does not see."""

import logging


class Announcement(AssertionError):
    """transformers warned of something."""


class Strict(logging.Handler):
    """Raises what others print."""

    def emit(self, record: logging.LogRecord) -> None:
        raise Announcement(record.getMessage())


def make_strict() -> None:
    """From here on in this process, and in those that it forks."""
    logger = logging.getLogger("transformers")
    if not any(isinstance(handler, Strict) for handler in logger.handlers):
        logger.addHandler(Strict(logging.WARNING))
