"""The demo's server without a browser: requests that no page would send."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("gradio")

from serving import Server, served


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("demo") / "log") as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as opened:
        yield opened


def asked(client: httpx.Client, picture: Any) -> str:
    """What comes back when Run is pressed with this as the picture."""
    config = client.get("config").json()
    components = {row["id"]: row["props"] for row in config["components"]}
    place = next(at for at, props in components.items() if props.get("elem_id") == "picture")
    event = next(e for e in config["dependencies"] if place in e["inputs"] and len(e["inputs"]) > 9)
    values = [picture if at == place else components[at].get("value") for at in event["inputs"]]
    request = {"data": values, "fn_index": event["id"], "session_hash": "someone"}
    client.post("gradio_api/queue/join", json=request).raise_for_status()
    found = []
    with client.stream("GET", "gradio_api/queue/data", params={"session_hash": "someone"}) as lines:
        for line in lines.iter_lines():
            if line.startswith("data:"):
                found.append(line)
                if json.loads(line[5:])["msg"] == "process_completed":
                    break
    return "\n".join(found)


def test_only_uploaded_files_are_read(client: httpx.Client, tmp_path: Path) -> None:
    from vlmfix.emoji import example_images

    ((_, picture),) = example_images(1)
    own = tmp_path / "private.png"
    picture.save(own)
    meta = {"_type": "gradio.FileData"}
    for said in (
        {"path": str(own)},
        {"path": str(own), "meta": meta},
        {"path": None, "url": f"file://{own}", "meta": meta},
    ):
        answer = asked(client, said)
        assert "data-word" not in answer and "teddy" not in answer
    with own.open("rb") as file:
        (uploaded,) = client.post("gradio_api/upload", files={"files": file}).json()
    assert "teddy" in asked(client, {"path": uploaded, "meta": meta})
    climbing = f"{Path(uploaded).parent}/../../../{str(own).lstrip('/')}"
    assert Path(climbing).exists()
    assert "there is no picture" in asked(client, {"path": climbing})


def test_no_file_of_the_machine_is_served(client: httpx.Client) -> None:
    assert client.get("gradio_api/file=/etc/passwd").status_code == 403


def test_large_files_are_refused(client: httpx.Client) -> None:
    large = {"files": ("large.png", b"0" * (21 * 2**20), "image/png")}
    assert client.post("gradio_api/upload", files=large).status_code == 413


def test_nothing_is_offered_as_an_interface(client: httpx.Client) -> None:
    assert client.get("gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}


STRANGER = "evil.example"


def test_a_page_of_another_name_cannot_use_the_demo(client: httpx.Client) -> None:
    """DNS rebinding: the name of a web site leads to this machine."""
    port = client.base_url.port
    for host in (f"{STRANGER}:{port}", STRANGER, "127.0.0.1.evil.example", "", "[::1"):
        for path in ("", "config", "gradio_api/upload_progress"):
            answer = client.get(path, headers={"Host": host})
            assert answer.status_code in (400, 403), (host, path)
            assert "gradio" not in answer.text
    headers = {"Host": f"{STRANGER}:{port}", "Origin": f"http://{STRANGER}:{port}"}
    answer = client.post("gradio_api/queue/join", json={}, headers=headers)
    assert (answer.status_code, "--allow-host" in answer.text) == (403, True)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "192.168.1.7"):
        assert client.get("config", headers={"Host": host}).status_code == 200


def test_a_page_of_another_site_cannot_use_the_demo(client: httpx.Client) -> None:
    own = f"127.0.0.1:{client.base_url.port}"
    strangers = (
        f"http://{STRANGER}",
        "http://192.168.1.7",
        "null",
        "http://127.0.0.1.evil.example",
        "http://localhost:1",  # another server on this machine
        "http://127.0.0.1:1",
    )
    for origin in strangers:
        for method in ("POST", "OPTIONS"):
            headers = {
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "content-type",
            }
            answer = client.request(method, "gradio_api/queue/join", headers=headers)
            assert answer.status_code == 403
            assert not [name for name in answer.headers if name.startswith("access-control")]
    assert client.get("config", headers={"Origin": f"http://{own}"}).status_code == 200
