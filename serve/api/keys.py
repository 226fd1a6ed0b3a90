"""API keys: who may call, kept as hashes in a YAML file that is read again when it changes.

    keys:
    - id: shop                  # in logs, in fair sharing, in the rate limit
      sha256: 5f0c…             # of the key; the key itself is shown once, when it is made
      scopes: [draw, metrics]
      per_minute: 120           # images a minute, candidates included; left out: no limit
      expires: 2027-06-30T00:00:00+09:00

Why a plain SHA-256: slow hashes (bcrypt, scrypt, Argon2) protect secrets that people choose, which can be guessed. A
key here is 32 bytes from the system's generator: whoever steals the file faces 2^256 guesses at any speed, while a slow
hash would cost the server 50 ms or more a request, wrong keys included. For the same reason others may read the file;
one that anybody may write is refused, since they could add a key of their own.

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

from engine.config import Section
from engine.config_files import load_yaml, parse_section
from engine.errors import InputError
from engine.files import atomic_file

KEY_PREFIX = "sk-kodalle-"  # lets secret scanners know a leaked key when they see one
_KEY_BYTES = 32
_LOOK_EVERY_S = 1.0
_BEARER = re.compile(r"bearer +([A-Za-z0-9\-._~+/]+=*) *", re.IGNORECASE | re.ASCII)  # RFC 6750, section 2.1
_MAX_HEADER_CHARACTERS = 512
_HEAD = "# API keys, as hashes. Changes are seen within a second. Comments do not survive the next key that is added.\n"

Scope = Literal["draw", "metrics"]
Rejection = Literal["unknown", "expired"]
_Stamp = tuple[int, int, int]

log = logging.getLogger(__name__)


class ApiKey(Section):
    """One entry of the file."""

    key_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = Field(alias="id")
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] = Field(repr=False)
    scopes: tuple[Scope, ...] = Field(min_length=1)
    per_minute: float | None = Field(None, gt=0, allow_inf_nan=False, description="images; None: no limit")
    expires: AwareDatetime | None = None

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes


class _KeyFile(Section):
    keys: tuple[ApiKey, ...]


class MalformedAuthorization(ValueError):
    """An Authorization header that is there but is not `Bearer` and a token."""


class KeyRing:
    """The keys in force. Not thread-safe: it belongs to one event loop.

    Args:
        clock: seconds that never go back; tells when to look at the file again.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises InputError: the file is missing, broken, or open to others' writing."""
        self._path, self._clock = path, clock
        self._stamp = _stamp(path)
        self._keys = _with_digests(_read(path))
        self._looked_at = clock()

    @classmethod
    def read(cls, path: Path) -> "KeyRing":
        """The keys in a file; raises InputError as the constructor does."""
        return cls(path)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented: str, now: float) -> ApiKey | Rejection:
        """Whose key this is.

        All entries are compared, each in constant time, so that the time tells nothing about which one is close.

        Args:
            presented: as the caller sent it.
            now: seconds since 1970, for `expires`.

        Returns:
            The entry; or why not: "expired" is only ever said to the holder of the right key.
        """
        self._look()
        digest = hashlib.sha256(presented.encode("utf-8", "surrogatepass")).digest()
        found: ApiKey | None = None
        for key, own_digest in self._keys:
            if hmac.compare_digest(own_digest, digest):
                found = key
        if found is None:
            return "unknown"
        return "expired" if found.expires is not None and found.expires.timestamp() <= now else found

    def _look(self) -> None:
        """Reads the file again when it has changed; a broken one changes nothing, and is told once."""
        if self._clock() - self._looked_at < _LOOK_EVERY_S:
            return
        self._looked_at = self._clock()
        stamp = _stamp(self._path)
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
    key_id: str, *, scopes: Sequence[Scope], per_minute: float | None = None, expires: datetime | None = None
) -> tuple[str, ApiKey]:
    """A new key and its entry.

    Returns:
        The key, which is kept nowhere, and what to keep of it.

    Raises:
        InputError: an id, scope, limit or date that no entry may have.
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
    scopes: Sequence[Scope],
    per_minute: float | None = None,
    expires: datetime | None = None,
) -> str:
    """Makes a key and adds it to a file, which is made where there is none, for its owner alone.

    A file that exists keeps its mode: whoever opened it to a group did so on purpose. Servers that have it open see
    either the old content or the new.

    Returns:
        The key: show it, it cannot be had again.

    Raises:
        InputError: the id is taken, the entry is not valid, or the file is broken.
    """
    keys = _read(path) if path.exists() else ()
    if any(key.key_id == key_id for key in keys):
        raise InputError("id", key_id, f"is taken in {path}: choose another, or remove that entry first")
    plain, key = make_key(key_id, scopes=scopes, per_minute=per_minute, expires=expires)
    entries = [one.model_dump(mode="json", by_alias=True, exclude_none=True) for one in (*keys, key)]
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o600
    with atomic_file(path) as temporary:
        temporary.chmod(mode)
        temporary.write_text(_HEAD + yaml.safe_dump({"keys": entries}, sort_keys=False), encoding="utf-8")
    return plain


def parse_authorization(header: str | None) -> str | None:
    """The token of `Authorization: Bearer …`; None without a header.

    Raises:
        MalformedAuthorization: another scheme, no token, or characters that no token has.
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
            raise InputError("keys_file", path, "anybody may write it: chmod o-w it, and look who is in it")
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            "keys_file", path, f"cannot be read ({error.strerror}): add a key, or mend the path"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError):
        # Neither the parser's excerpt nor a wrong value is told: a key may stand there by mistake.
        raise InputError("keys_file", path, "is not valid YAML: mend it, or go back to the last one") from None
    if not isinstance(tree, dict):
        raise InputError("keys_file", path, "must hold `keys:` and a list of them")
    try:
        keys: tuple[ApiKey, ...] = parse_section(_KeyFile, tree, source=str(path)).keys
    except InputError as error:
        raise InputError(error.field, "(not shown)", error.remedy) from None
    for field, values in (("id", [key.key_id for key in keys]), ("sha256", [key.sha256 for key in keys])):
        if len(set(values)) < len(values):
            raise InputError(f"keys.{field}", "(not shown)", f"two keys have the same one, in {path}")
    return keys


def _with_digests(keys: Sequence[ApiKey]) -> list[tuple[ApiKey, bytes]]:
    return [(key, bytes.fromhex(key.sha256)) for key in keys]


def _sha256(plain: str) -> str:
    return hashlib.sha256(plain.encode()).hexdigest()


def _stamp(path: Path) -> _Stamp | None:
    """Changes when the file does; None when there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
