"""API keys: read where an endpoint is deployed from; only digests of them travel."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from pathlib import Path

from nesa_ray.errors import InvalidConfig
from nesa_ray.serving.config import EndpointConfig


class ApiKeys:
    """The keys that are accepted, kept as SHA-256 digests: what travels to replicas can't be used as a key."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = tuple(_digest(k) for k in keys)

    @classmethod
    def of(cls, config: EndpointConfig) -> ApiKeys:
        """Reads the keys where the configuration says; without any, every request is let in.

        Raises InvalidConfig for an environment variable or a file without a key.
        """
        given = config.api_keys
        if given is None:
            return cls(())
        if isinstance(given, str):
            given = _keys_at(given)
        return cls(given)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def allow(self, authorization: bytes) -> bool:
        """Whether an Authorization header has one of the keys; every key is compared, each in constant time."""
        scheme, _, key = authorization.decode("latin-1").partition(" ")
        given = _digest(key.strip())
        found = [hmac.compare_digest(given, d) for d in self._digests]
        return not found or (scheme.lower() == "bearer" and any(found))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _keys_at(place: str) -> tuple[str, ...]:
    kind, _, name = place.partition(":")
    if kind == "env":
        text = os.environ.get(name, "")
        where = f"the environment variable {name}"
    else:
        where = place
        try:
            text = Path(place).read_text(encoding="utf-8")
        except (OSError, ValueError) as e:
            raise InvalidConfig(f"serve: api_keys: {place}: can't be read: {e}") from None
    keys = tuple(re.split(r"[\s,]+", text.strip())) if text.strip() else ()
    if not keys:
        raise InvalidConfig(f"serve: api_keys: {where} holds no key")
    return keys
