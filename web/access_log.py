"""Links that let somebody in are secrets: the access log says that one was used, not which."""

import logging
import re

_LINK = re.compile(r"^(/(?:uploads/(?:signed|resumable)|audio)/)[^?]+|^(/app/sign-in/confirm\?).+")


class HideLinks(logging.Filter):
    """Takes the secrets out of the path in uvicorn's access log."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record through; its path is the third of uvicorn's arguments."""
        if isinstance(record.args, tuple):
            record.args = tuple(
                _LINK.sub(r"\1\2…", arg) if isinstance(arg, str) else arg for arg in record.args
            )
        return True


def hide_links() -> None:
    """Apply ``HideLinks`` to uvicorn's access log."""
    logging.getLogger("uvicorn.access").addFilter(HideLinks())
