"""--api-key."""

from __future__ import annotations

import pytest

KEY = "open-sésame"
BODIES = {
    "/v1/completions": {"prompt": "k", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "k"}], "max_tokens": 1},
    "/tokenize": {"prompt": "k"},
    "/detokenize": {"tokens": [5]},
}


@pytest.fixture
def locked(start):
    return start(api_key=KEY)


def bearer(key):
    return {"Authorization": f"Bearer {key}".encode()}


def test_the_key_is_asked_for_wherever_something_is_computed_or_told(locked):
    for headers in ({}, bearer("wrong"), {"Authorization": KEY.encode()}, {"Authorization": b"Basic x"}):
        for path, body in BODIES.items():
            response = locked.http.post(path, json=body, headers=headers)
            assert response.status_code == 401, (path, headers)
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/models", "/v1/models/fake", "/v1/config", "/nowhere"):
            assert locked.http.get(path, headers=headers).status_code == 401
    for path, body in BODIES.items():
        assert locked.http.post(path, json=body, headers=bearer(KEY)).status_code == 200
    assert locked.http.get("/v1/models", headers=bearer(KEY)).status_code == 200
    for path in ("/health", "/ping", "/metrics", "/version"):
        assert locked.http.get(path).status_code == 200
    assert KEY not in locked.log
