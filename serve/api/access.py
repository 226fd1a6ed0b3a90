"""Access control: requests with an API key, or, on a server without keys, requests from the same machine only.

Without keys four things are checked, because listening on loopback alone is not enough:

    the local end of the connection is loopback    a server that listens elsewhere by mistake rejects every request
    the Host header names loopback                 a web page whose name was rebound to 127.0.0.1 sends its own name
    no header of a proxy                           a proxy on this machine passes other machines' requests on
    an Origin header equals the Host, or is listed another website's page can post forms to any address

With keys none of them is needed: a browser does not add a key to another page's requests.

Always open: /healthz, /readyz and the page's files. All other paths, unknown ones included, need access.
"""

import ipaddress
import time
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from serve.api.cross_origin import origin_of
from serve.api.errors import Failure
from serve.api.keys import ApiKey, KeyRing, KeyScope, MalformedAuthorization, parse_authorization

_OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/favicon.ico"})
# Proxies name the machine that asked in one of these, or themselves: nginx, AWS, Google, Cloudflare, Fastly, Akamai, Envoy, Kubernetes.
_PROXY_HEADERS = frozenset(
    ("forwarded", "via", "x-real-ip", "x-client-ip", "client-ip", "true-client-ip", "cf-connecting-ip", "cf-ray", "fastly-client-ip",
     "x-cluster-client-ip", "x-original-forwarded-for", "x-original-host", "x-envoy-external-address", "x-proxyuser-ip",
     "x-azure-clientip", "x-appengine-user-ip", "fly-client-ip", "wl-proxy-client-ip", "proxy-client-ip", "x-remote-ip", "x-remote-addr")
)  # fmt: skip
_PROXY_PREFIX = "x-forwarded"  # -for, -host, -proto, -port, -server, -prefix and what else there is
_OPEN_FOLDER = "/page/"
_SCOPE_OF: dict[str, KeyScope] = {"/metrics": "metrics"}  # everything else: generate


@dataclass(frozen=True)
class Caller:
    """The sender of a request."""

    key_id: str
    key: ApiKey | None = None  # None: the server has no keys


LOCAL = Caller("local")
REJECTED = Caller("")


def admit(scope: Scope, path: str, keys: KeyRing | None, *, origins: Collection[str] = ()) -> Caller:
    """The caller of a request to `path`; raises Failure when the connection or the key has no access to it.

    Args:
        keys: of the server; None: it has none.
        origins: other origins whose pages a server without keys answers, too.
    """
    if path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER):
        return LOCAL
    headers = Headers(scope=scope)
    if keys is not None:
        return _holder(headers, keys, _SCOPE_OF.get(path, "generate"))
    _check_local(scope, headers, origins)
    return LOCAL


def _holder(headers: Headers, keys: KeyRing, scope: KeyScope) -> Caller:
    values = headers.getlist("authorization")
    try:
        presented = parse_authorization(", ".join(values) if values else None)
    except MalformedAuthorization:
        raise _invalid(
            "Send `Authorization: Bearer` and a key, once.", "`Authorization: Bearer` 형식이 아닙니다."
        ) from None
    if presented is None:
        raise Failure("missing_api_key", headers={"www-authenticate": "Bearer"})
    key = keys.find(presented, time.time())
    if key == "expired":
        raise _invalid("It has expired.", "만료된 키입니다.")
    if not isinstance(key, ApiKey):
        raise _invalid("", "")
    if not key.allows(scope):
        raise Failure("insufficient_scope", f"It lacks the scope `{scope}`.", f"`{scope}` 권한이 없습니다.")
    return Caller(key.key_id, key)


def _invalid(detail: str, detail_ko: str) -> Failure:
    return Failure("invalid_api_key", detail, detail_ko, headers={"www-authenticate": 'Bearer error="invalid_token"'})


def _check_local(scope: Scope, headers: Headers, origins: Collection[str]) -> None:
    server = scope.get("server")
    if server is None or not _is_loopback(server[0]):
        raise Failure(
            "not_local",
            "It listens on another address, too: start it with a keys file.",
            "다른 주소에서도 쓰려면 키 파일을 지정하세요.",
        )
    hosts = headers.getlist("host")
    name = _host_name(hosts[0]) if len(hosts) == 1 else ""
    if not _is_loopback(name):
        raise Failure(
            "not_local",
            "The Host header must name this machine: use http://localhost or http://127.0.0.1.",
            "http://localhost 또는 http://127.0.0.1 주소로 접속하세요.",
        )
    if any(name in _PROXY_HEADERS or name.startswith(_PROXY_PREFIX) for name in headers):
        raise Failure(
            "not_local",
            "A proxy passed this request on, perhaps for another machine: start the server with a keys file.",
            "프록시를 거친 요청입니다. 프록시를 쓰려면 키 파일을 지정하세요.",
        )
    if origin_of(headers) in origins:
        return
    for origin in headers.getlist("origin"):
        if urlsplit(origin).netloc.lower() != hosts[0].lower():
            raise Failure("cross_site")


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
