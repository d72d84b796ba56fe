"""API keys open the server, and divide what it has computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import serving

from trimode import Engine, TriModeModel
from trimode.errors import UsageError
from trimode.server.auth import ApiKeys, salt_of
from trimode.server.service import Service

BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Add: 7 + 8 ="}],
    "max_tokens": 2,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def address(demo_model: TriModeModel) -> Iterator[str]:
    with Engine(demo_model, max_rows=2) as engine:
        service = Service(engine, "demo", keys=ApiKeys(["first-key", "second-key"]))
        with serving(service) as address:
            yield address


def ask(address: str, key: str | None, **more: Any) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{address}/v1/chat/completions", json=BODY | more, headers=headers)


@pytest.mark.parametrize("key", [None, "other", "first-key2", "first-ke", "first-key second-key"])
def test_without_a_valid_key_nothing_is_answered(address: str, key: str | None) -> None:
    answer = ask(address, key)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/nothing"])
def test_every_other_path_asks_for_a_key(address: str, path: str) -> None:
    assert httpx.get(address + path).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/ready", "/version"])
def test_probes_need_no_key(address: str, path: str) -> None:
    assert httpx.get(address + path).status_code == 200


def test_keys_share_nothing_they_have_computed(address: str) -> None:
    """Whatever salt a client invents: another key's prefix is never found."""
    own = ask(address, "first-key").json()
    again = ask(address, "first-key").json()
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == own["usage"]["prompt_tokens"] - 1
    for salt in ("", salt_of(ApiKeys(["first-key"]).check("Bearer first-key"), "")):
        other = ask(address, "second-key", cache_salt=salt).json()
        assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_salts_differ_wherever_key_or_salt_differ() -> None:
    pairs = [(key, salt) for key in (None, "a", "b", "ab") for salt in ("", "a", "b", '["a", ""]')]
    salts = {salt_of(key, salt) for key, salt in pairs if key is not None}
    assert len(salts) == 12
    assert salt_of(None, "own") == "own"


def test_a_file_of_keys_is_read(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nabc\n\n  def \n")
    keys = ApiKeys.from_file(file)
    assert len(keys) == 2
    assert keys.check("bearer def") != keys.check("Bearer abc")
    file.write_text("# none\n")
    with pytest.raises(UsageError, match="expected an API key, found none"):
        ApiKeys.from_file(file)
    with pytest.raises(UsageError, match="expected a readable file"):
        ApiKeys.from_file(tmp_path / "missing")
