"""What a client may see of an exception."""

from __future__ import annotations

import logging
import secrets

from moiety.errors import MoietyError

_log = logging.getLogger(__name__)


def visible(error: Exception, request_id: str = "") -> MoietyError:
    """Returns `error` if it is one of ours, else one that a client may see.

    An exception that is not ours may quote anything. It is logged with its traceback; the client gets only an id to find it
    by: `request_id`, or a new one.
    """
    if isinstance(error, MoietyError):
        return error
    request_id = request_id or secrets.token_hex(8)
    _log.error("request %s failed by an unexpected error", request_id, exc_info=error)
    return MoietyError(f"internal error; the service's log has it under request id {request_id}")
