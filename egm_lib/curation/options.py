"""The options of a request, what a service accepts of them, and the errors of a run that asks.

Nothing here needs the client's library, which takes half a second to load: notebooks read what was
asked before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from egm_lib.errors import EgmError
from egm_lib.profile import Teacher

TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
_UNSUPPORTED = re.compile(
    r"unsupported|not support|unknown|unrecogni[sz]ed|unexpected|extra (?:inputs|fields)"
    r"|not (?:permitted|allowed|accepted)|forbidden|only the default|cannot find field",
    re.IGNORECASE,
)


class CurationError(EgmError, RuntimeError):
    """The run cannot start or continue; the message says why and what to do."""


class Refused(CurationError):
    """The service refuses everything: wrong key, wrong model, no credit."""


def sampling_options(teacher: Teacher, temperature: float | None) -> dict:
    """The fields of a request beside model and messages, as the profile wants them.

    OpenAI's reasoning models take no temperature and have a name of their own for the limit.
    temperature: None leaves it out.
    """
    reasons = re.match(r"(.*/)?(o\d|gpt-5)", teacher.model) is not None
    limit = teacher.token_limit or ("max_completion_tokens" if reasons else "max_tokens")
    options: dict = {} if reasons or temperature is None else {"temperature": temperature}
    options |= {limit: teacher.max_tokens, **teacher.extra_body}
    return {name: value for name, value in options.items() if value is not None}


class AcceptedOptions:
    """What of the wanted options a service accepts, learned from its refusals.

    sent: the options of the next request. notes: what was learned, a sentence each.
    """

    def __init__(self, wanted: Mapping) -> None:
        self.sent = dict(wanted)
        self.notes: list[str] = []
        self._refused: set[str] = set()

    def learn(self, message: str, sent: Mapping) -> bool:
        """Read a refusal of a request with the options `sent`; True where asking again may help."""
        if sent != self.sent:  # another request has learned something meanwhile
            return True
        name = _refused_option(message, sent)
        if name is None:
            return False
        self._refused.add(name)
        if name in TOKEN_LIMITS:
            other = next(limit for limit in TOKEN_LIMITS if limit != name)
            if other in self._refused:  # never without a limit: it is what the budget counts on
                return False
            self.sent = {other if key == name else key: value for key, value in sent.items()}
            self.notes.append(f"the service refuses {name!r}: it is asked with {other!r} instead")
        else:
            self.sent = {key: value for key, value in sent.items() if key != name}
            self.notes.append(f"the service refuses {name!r}: it is asked without it")
        return True


def _refused_option(message: str, sent: Mapping) -> str | None:
    """The option that a refusal calls unknown or unsupported, None if it names none."""
    if not _UNSUPPORTED.search(message):
        return None
    # The first one named is refused; another may follow as the one to use instead.
    places = {name: re.search(rf"\b{re.escape(name)}\b", message) for name in sent}
    found = [(match.start(), name) for name, match in places.items() if match]
    return min(found)[1] if found else None
