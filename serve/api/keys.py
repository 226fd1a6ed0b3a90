"""API keys, stored as hashes in a YAML file that is read again when it changes.

    keys:
    - id: shop                  # in logs, in fair queueing, in the rate limit
      sha256: 5f0c…             # of the key; the key itself is shown once, when it is created
      scopes: [generate, metrics]
      per_minute: 120           # images a minute, candidates included; without it: no limit
      expires: 2027-06-30T00:00:00+09:00

Why a plain SHA-256: slow hashes (bcrypt, scrypt, Argon2) protect secrets that people choose, which can be guessed. A
key here is 32 bytes from the system's generator: a stolen file leaves 2^256 guesses at any speed, while a slow hash would
cost the server 50 ms or more a request, wrong keys included. For the same reason the file may be world-readable; a
world-writable one is refused, because anyone could add a key.

No torch, no ray.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AwareDatetime, Field, StringConstraints

from engine.config.section import Section, parse_section
from engine.config_files import load_yaml
from engine.errors import InputError
from engine.files import atomic_file

KEY_PREFIX = "sk-kodalle-"  # lets secret scanners recognize a leaked key
_KEY_BYTES = 32
_CHECK_EVERY_S = 1.0
_MISSING_FOR_S = 60.0  # editors and deployments replace a file within seconds
_BEARER = re.compile(r"bearer +([A-Za-z0-9\-._~+/]+=*) *", re.IGNORECASE | re.ASCII)  # RFC 6750, section 2.1
_MAX_HEADER_CHARACTERS = 512
_HEADER = "# API keys, as hashes. Changes take effect within a second. Adding a key removes comments.\n"

KeyScope = Literal["generate", "metrics"]
Rejection = Literal["unknown", "expired"]
_Stamp = tuple[int, int, int]

log = logging.getLogger(__name__)


class ApiKey(Section):
    """One entry of the file."""

    key_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = Field(alias="id")
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] = Field(repr=False)
    scopes: tuple[KeyScope, ...] = Field(min_length=1)
    per_minute: float | None = Field(None, gt=0, allow_inf_nan=False, description="images; None: no limit")
    expires: AwareDatetime | None = None

    def allows(self, scope: KeyScope) -> bool:
        return scope in self.scopes


class _KeyFile(Section):
    keys: tuple[ApiKey, ...]


class MalformedAuthorization(ValueError):
    """An Authorization header that is not `Bearer` and a token."""


class KeyRing:
    """The keys in force. Not thread-safe: it belongs to one event loop.

    Args:
        clock: monotonic seconds, for checking the file again.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises InputError: the file is missing, malformed, or world-writable."""
        self._path, self._clock = path, clock
        self._stamp = _stamp(path)
        self._keys = _with_digests(_read(path))
        self._checked_at = clock()
        self._missing_since: float | None = None
        self._is_outdated = False

    @classmethod
    def read(cls, path: Path) -> "KeyRing":
        """The keys in a file; raises InputError as the constructor does."""
        return cls(path)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented: str, now: float) -> ApiKey | Rejection:
        """The entry of a presented key, or the reason for its rejection.

        All entries are compared, each in constant time, so that timing reveals nothing about them.

        Args:
            presented: the key as the client sent it.
            now: Unix seconds, for `expires`.

        Returns:
            The entry; or why not: only the holder of a valid key learns that it has expired.
        """
        self._reload_if_changed()
        digest = hashlib.sha256(presented.encode("utf-8", "surrogatepass")).digest()
        found: ApiKey | None = None
        for key, own_digest in self._keys:
            if hmac.compare_digest(own_digest, digest):
                found = key
        if found is None:
            return "unknown"
        return "expired" if found.expires is not None and found.expires.timestamp() <= now else found

    def is_outdated(self) -> bool:
        """Whether the file has been missing for a minute: its last keys stay in force, but none can be removed."""
        self._reload_if_changed()
        return self._is_outdated

    def _note_missing(self, is_missing: bool) -> None:
        if not is_missing:
            self._missing_since, self._is_outdated = None, False
            return
        if self._missing_since is None:
            self._missing_since = self._checked_at
        if not self._is_outdated and self._checked_at - self._missing_since >= _MISSING_FOR_S:
            self._is_outdated = True
            log.error(
                "%s has been missing for %g s: the server is not ready until it is back", self._path, _MISSING_FOR_S
            )

    def _reload_if_changed(self) -> None:
        """Reads the file again when it has changed; a malformed file changes nothing and is logged once."""
        if self._clock() - self._checked_at < _CHECK_EVERY_S:
            return
        self._checked_at = self._clock()
        stamp = _stamp(self._path)
        self._note_missing(stamp is None)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _with_digests(_read(self._path))
        except InputError as error:
            log.error("%s; the %d keys read before stay in force", error, len(self._keys))
        else:
            log.info("%s: %d keys", self._path, len(self._keys))


def make_key(
    key_id: str, *, scopes: Sequence[KeyScope], per_minute: float | None = None, expires: datetime | None = None
) -> tuple[str, ApiKey]:
    """A new key and its entry.

    Returns:
        The key, which is stored nowhere, and the entry to store.

    Raises:
        InputError: an invalid id, scope, limit or date.
    """
    plain = KEY_PREFIX + secrets.token_urlsafe(_KEY_BYTES)
    entry: dict[str, Any] = {"id": key_id, "sha256": _sha256(plain), "scopes": list(scopes)}
    if per_minute is not None:
        entry["per_minute"] = per_minute
    if expires is not None:
        entry["expires"] = expires.isoformat()
    key: ApiKey = parse_section(ApiKey, entry, source="the new key")
    return plain, key


def add_key(
    path: Path,
    key_id: str,
    *,
    scopes: Sequence[KeyScope],
    per_minute: float | None = None,
    expires: datetime | None = None,
) -> str:
    """Creates a key and adds it to a file, which is created, private to its owner, when missing.

    An existing file keeps its mode. The file is replaced atomically: servers read either the old content or the new.

    Returns:
        The key; it cannot be recovered later.

    Raises:
        InputError: the id is taken, the entry is invalid, or the file is malformed.
    """
    keys = _read(path) if path.exists() else ()
    if any(key.key_id == key_id for key in keys):
        raise InputError("id", key_id, f"is taken in {path}: choose another, or remove that entry first")
    plain, key = make_key(key_id, scopes=scopes, per_minute=per_minute, expires=expires)
    entries = [one.model_dump(mode="json", by_alias=True, exclude_none=True) for one in (*keys, key)]
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o600
    with atomic_file(path) as temporary:
        temporary.chmod(mode)
        temporary.write_text(_HEADER + yaml.safe_dump({"keys": entries}, sort_keys=False), encoding="utf-8")
    return plain


def parse_authorization(header: str | None) -> str | None:
    """The token of `Authorization: Bearer …`; None without a header.

    Raises:
        MalformedAuthorization: another scheme, no token, or characters that are not allowed in a token.
    """
    if header is None:
        return None
    match = _BEARER.fullmatch(header) if len(header) <= _MAX_HEADER_CHARACTERS else None
    if match is None:
        raise MalformedAuthorization("the Authorization header must be `Bearer` and a key")
    return match[1]


def _read(path: Path) -> tuple[ApiKey, ...]:
    try:
        if os.name == "posix" and path.stat().st_mode & stat.S_IWOTH:
            raise InputError("keys_file", path, "is world-writable: chmod o-w it, and check its entries")
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            "keys_file", path, f"cannot be read ({error.strerror}): add a key, or correct the path"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError):
        # Neither the parser's excerpt nor a bad value is reported: it may be a key, put there by mistake.
        raise InputError("keys_file", path, "is not valid YAML: correct it, or restore the previous one") from None
    if not isinstance(tree, dict):
        raise InputError("keys_file", path, "must contain `keys:` and a list of keys")
    try:
        keys: tuple[ApiKey, ...] = parse_section(_KeyFile, tree, source=str(path)).keys
    except InputError as error:
        raise InputError(error.field, "(not shown)", error.remedy) from None
    for field, values in (("id", [key.key_id for key in keys]), ("sha256", [key.sha256 for key in keys])):
        if len(set(values)) < len(values):
            raise InputError(f"keys.{field}", "(not shown)", f"two keys have the same value, in {path}")
    return keys


def _with_digests(keys: Sequence[ApiKey]) -> list[tuple[ApiKey, bytes]]:
    return [(key, bytes.fromhex(key.sha256)) for key in keys]


def _sha256(plain: str) -> str:
    return hashlib.sha256(plain.encode()).hexdigest()


def _stamp(path: Path) -> _Stamp | None:
    """Changes whenever the file does; None for a missing file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
