import hmac
import logging
import os
import re
import stat
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import yaml

from engine.errors import InputError
from serve.api import keys as keys_module
from serve.api.application import build_api
from serve.api.keys import ApiKey, KeyRing, MalformedAuthorization, add_key, make_key, parse_authorization
from serve.settings import ServeSettings
from tests.live_server import ScriptedPool, ask, serving

NOW = datetime(2027, 6, 1, tzinfo=UTC).timestamp()


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def found_id(ring: KeyRing, presented: str, *, now: float = NOW) -> str:
    found = ring.find(presented, now)
    return found if isinstance(found, str) else found.key_id


# ------------------------------------------------------------------------------------------------------ finding a key


def test_an_added_key_is_found_and_similar_ones_are_not(path: Path) -> None:
    plain = add_key(path, "shop", scopes=["generate"], per_minute=120)
    other = add_key(path, "robot", scopes=["generate", "metrics"])
    ring = KeyRing.read(path)
    assert (found_id(ring, plain), found_id(ring, other)) == ("shop", "robot")
    key = ring.find(plain, NOW)
    assert isinstance(key, ApiKey)
    assert (key.per_minute, key.allows("generate"), key.allows("metrics")) == (120, True, False)
    for wrong in ("", plain[:-1], plain + "x", plain.upper(), key.sha256, "shop", "sk-kodalle-", "키", "\ud800", "\0"):
        assert ring.find(wrong, NOW) == "unknown"


def test_expiry_is_a_point_in_time_in_any_time_zone(path: Path) -> None:
    ends = datetime(2027, 6, 30, 0, 0, tzinfo=timezone(timedelta(hours=9)))
    plain = add_key(path, "summer", scopes=["generate"], expires=ends)
    ring = KeyRing.read(path)
    assert found_id(ring, plain, now=ends.timestamp() - 1) == "summer"
    assert found_id(ring, plain, now=ends.timestamp()) == "expired"
    assert found_id(ring, plain + "x", now=ends.timestamp()) == "unknown"
    assert ends.timestamp() == datetime(2027, 6, 29, 15, tzinfo=UTC).timestamp()


def test_all_entries_are_compared_whichever_one_matches(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plains = [add_key(path, f"key-{index}", scopes=["generate"]) for index in range(5)]
    ring, compared = KeyRing.read(path), []

    def counted(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(keys_module, "hmac", type("counting", (), {"compare_digest": staticmethod(counted)}))
    for presented in [*plains, "wrong"]:
        compared.clear()
        ring.find(presented, NOW)
        assert len(compared) == 5


def test_keys_are_random_and_long_and_their_entries_hold_only_the_hash(path: Path) -> None:
    made = [make_key("shop", scopes=["generate"]) for _ in range(100)]
    plains = {plain for plain, _ in made}
    assert len(plains) == 100
    assert all(re.fullmatch(r"sk-kodalle-[A-Za-z0-9_-]{43}", plain) for plain in plains)
    plain = add_key(path, "shop", scopes=["generate"])
    assert plain not in path.read_text()
    assert plain.removeprefix("sk-kodalle-") not in path.read_text()
    assert all(key.sha256 not in repr(key) for _, key in made)


# ---------------------------------------------------------------------------------------------------------- the file


def test_a_new_file_is_private_and_an_existing_one_keeps_its_mode(path: Path) -> None:
    add_key(path, "shop", scopes=["generate"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    add_key(path, "robot", scopes=["generate"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [entry["id"] for entry in yaml.safe_load(path.read_text())["keys"]] == ["shop", "robot"]
    assert list(path.parent.iterdir()) == [path]  # no temporary file is left


def test_a_taken_id_or_an_invalid_entry_leaves_the_file_unchanged(path: Path) -> None:
    add_key(path, "shop", scopes=["generate"])
    before = path.read_bytes()
    with pytest.raises(InputError, match="is taken"):
        add_key(path, "shop", scopes=["generate"])
    with pytest.raises(InputError, match=r"^id: "):
        add_key(path, "no spaces please", scopes=["generate"])
    with pytest.raises(InputError, match="scopes"):
        add_key(path, "robot", scopes=[])
    with pytest.raises(InputError, match="scopes"):
        add_key(path, "robot", scopes=["everything"])  # type: ignore[list-item]
    with pytest.raises(InputError, match="per_minute"):
        add_key(path, "robot", scopes=["generate"], per_minute=0)
    with pytest.raises(InputError, match="expires"):
        add_key(path, "robot", scopes=["generate"], expires=datetime(2027, 1, 1))
    assert path.read_bytes() == before


def test_a_file_written_by_hand_is_read(path: Path) -> None:
    plain, key = make_key("shop", scopes=["generate"])
    path.write_text(
        f"# ours\nkeys:\n- id: shop\n  sha256: {key.sha256}\n  scopes: [generate, metrics]\n"
        "  per_minute: 30\n  expires: 2027-06-30T00:00:00+09:00\n"
    )
    path.chmod(0o644)  # others may read it
    assert found_id(KeyRing.read(path), plain) == "shop"
    path.write_text("keys: []\n")
    assert found_id(KeyRing.read(path), plain) == "unknown"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("id: shop -> name: shop", "keys.0"),
        ("sha256: -> sha256: f", "keys.0.sha256"),
        ("[generate] -> [generate, all]", "keys.0.scopes"),
        ("[generate] -> []", "keys.0.scopes"),
        ("[generate] -> generate", "keys.0.scopes"),
        ("per_minute: 30 -> per_minute: -1", "keys.0.per_minute"),
        ("per_minute: 30 -> per_minute: '30'", "keys.0.per_minute"),
        ("per_minute: 30 -> per_hour: 30", "keys.0.per_hour"),
        ("+09:00 -> ", "keys.0.expires"),  # no zone
        ("T00:00:00+09:00 -> ", "keys.0.expires"),  # a day is none either
        ("keys: -> key:", "key"),
        ("keys:\n -> ", "keys_file"),  # a list
        ("id: shop -> id: [", "keys_file"),  # no YAML
        ("per_minute: 30 -> per_minute: 30\n  scopes: [metrics]", "keys_file"),  # twice
    ],
)
def test_an_invalid_entry_is_an_error_that_names_the_field_and_shows_no_value(
    path: Path, change: str, field: str
) -> None:
    entry = "keys:\n- id: shop\n  sha256: SHA\n  scopes: [generate]\n  per_minute: 30\n  expires: 2027-06-30T00:00:00+09:00\n"
    _, key = make_key("shop", scopes=["generate"])
    old, _, new = change.partition(" -> ")
    assert old in entry
    path.write_text(entry.replace(old, new).replace("SHA", key.sha256))
    with pytest.raises(InputError) as caught:
        KeyRing.read(path)
    assert caught.value.field.startswith(field)
    assert key.sha256 not in str(caught.value)


def test_a_key_pasted_in_place_of_its_hash_is_not_reported(path: Path) -> None:
    plain, _ = make_key("shop", scopes=["generate"])
    path.write_text(f"keys:\n- id: shop\n  sha256: {plain}\n  scopes: [generate]\n")
    with pytest.raises(InputError) as caught:
        KeyRing.read(path)
    assert plain not in str(caught.value)
    path.write_text(f"keys: {plain}: [\n")
    with pytest.raises(InputError) as caught:
        KeyRing.read(path)
    assert plain not in str(caught.value)


def test_two_entries_must_not_share_an_id_or_a_hash(path: Path) -> None:
    plain = add_key(path, "shop", scopes=["generate"])
    entry = yaml.safe_load(path.read_text())["keys"][0]
    for change, field in (({"sha256": "0" * 64}, "keys.id"), ({"id": "robot"}, "keys.sha256")):
        path.write_text(yaml.safe_dump({"keys": [entry, entry | change]}))
        with pytest.raises(InputError) as caught:
            KeyRing.read(path)
        assert caught.value.field == field
        assert plain not in str(caught.value)


def test_a_missing_file_and_a_world_writable_one_are_refused(path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        KeyRing.read(path)
    add_key(path, "shop", scopes=["generate"])
    path.chmod(0o646)
    with pytest.raises(InputError, match="world-writable"):
        KeyRing.read(path)
    path.chmod(0o644)
    assert len(KeyRing.read(path)) == 1


# --------------------------------------------------------------------------------------------------------- reloading


def test_a_changed_file_is_read_again_at_most_once_a_second(path: Path) -> None:
    first, clock = add_key(path, "shop", scopes=["generate"]), Clock()
    ring = KeyRing(path, clock=clock)
    second = add_key(path, "robot", scopes=["generate"])
    clock.now_s = 0.9
    assert found_id(ring, second) == "unknown"
    clock.now_s = 1.0
    assert (found_id(ring, first), found_id(ring, second)) == ("shop", "robot")
    path.write_text("keys: []\n")  # a removed key is rejected
    clock.now_s = 2.0
    assert found_id(ring, first) == "unknown"


def test_a_file_that_did_not_change_is_not_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, clock = add_key(path, "shop", scopes=["generate"]), Clock()
    reads: list[Path] = []
    ring = KeyRing(path, clock=clock)
    read = keys_module._read

    def recorded(where: Path) -> tuple[ApiKey, ...]:
        reads.append(where)
        return read(where)

    monkeypatch.setattr(keys_module, "_read", recorded)
    for second in range(10):
        clock.now_s = float(second)
        assert found_id(ring, plain) == "shop"
    assert reads == []
    os.utime(path, ns=(1, 1))
    clock.now_s = 11.0
    assert found_id(ring, plain) == "shop"
    assert reads == [path]


@pytest.mark.parametrize("fault", ["broken", "gone", "open to all"])
def test_a_malformed_new_file_keeps_the_old_keys_and_is_logged_once(
    path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain, clock = add_key(path, "shop", scopes=["generate"]), Clock()
    ring = KeyRing(path, clock=clock)
    if fault == "broken":
        path.write_text(f"keys: [{plain}]\n")
    elif fault == "gone":
        path.unlink()
    else:
        path.write_text("keys: []\n")
        path.chmod(0o666)
    with caplog.at_level(logging.INFO, logger="serve.api.keys"):
        for second in range(1, 20):
            clock.now_s = float(second)
            assert found_id(ring, plain) == "shop"
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert "1 keys read before stay in force" in caplog.text
        assert plain not in caplog.text
        path.unlink(missing_ok=True)
        added = add_key(path, "robot", scopes=["generate"])
        clock.now_s = 30.0
        assert (found_id(ring, added), found_id(ring, plain)) == ("robot", "unknown")


def test_a_file_that_stays_away_makes_the_server_unready_until_it_is_back(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, clock = add_key(path, "shop", scopes=["generate"]), Clock()
    ring = KeyRing(path, clock=clock)
    content = path.read_bytes()
    path.unlink()
    for second, is_outdated in ((1, False), (60, False), (61, True), (1000, True)):
        clock.now_s = float(second)
        assert ring.is_outdated() is is_outdated, second
        assert found_id(ring, plain) == "shop"
    assert [record.message for record in caplog.records if "has been missing for 60 s" in record.message] != []
    assert len(caplog.records) == 2
    path.write_bytes(content)
    clock.now_s = 1001.0
    assert not ring.is_outdated()


def test_readiness_follows_the_keys_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_key(path, "shop", scopes=["generate"])
    monkeypatch.setattr(keys_module, "_MISSING_FOR_S", 0.0)
    monkeypatch.setattr(keys_module, "_CHECK_EVERY_S", 0.0)
    with serving(build_api(ScriptedPool(), ServeSettings(page=False, keys_file=str(path)))) as port:
        assert ask(port, "GET", "/readyz").status == 200
        path.unlink()
        assert ask(port, "GET", "/readyz").status == 503
        assert ask(port, "GET", "/healthz").status == 200


# -------------------------------------------------------------------------------------------------------- the header


@pytest.mark.parametrize("header", ["Bearer abc-._~+/123==", "bearer abc-._~+/123==", "BEARER   abc-._~+/123==  "])
def test_a_bearer_header_contains_a_token(header: str) -> None:
    assert parse_authorization(header) == "abc-._~+/123=="


def test_a_missing_header_is_none() -> None:
    assert parse_authorization(None) is None


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", "Bearer a b", "Basic dXNlcjpwYXNz", "abc", "Bearerabc", " Bearer abc", "Bearer a\n"]
    + ["Bearer 키", "Bearer a,b", "Bearer =a", "Bearer\tabc", "Bearer " + "a" * 506],
)
def test_a_malformed_header_is_an_error(header: str) -> None:
    with pytest.raises(MalformedAuthorization):
        parse_authorization(header)


def test_the_longest_header_is_parsed() -> None:
    assert parse_authorization("Bearer " + "a" * 505) == "a" * 505
