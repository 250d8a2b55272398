# SPDX-License-Identifier: Apache-2.0
"""Images: what is let in, and that it comes out byte for byte."""

from __future__ import annotations

import hashlib
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from ppec_contract.errors import PpecError
from ppec_orchestrator.api.services import Services
from ppec_orchestrator.image_formats import HEADER_BYTES, virtual_size_mib
from ppec_orchestrator.image_store import ImageStore

MIB = 1024 * 1024
RAW = b"disk" * 256  # 1 KiB


def qcow2(*, size: int = 3 * MIB + 1, version: int = 3, backing: int = 0, crypt: int = 0, features: int = 0) -> bytes:
    """A qcow2 header and its empty cluster table: enough for whoever reads headers."""
    header = struct.pack(
        ">4s I Q I I Q I I Q", b"QFI\xfb", version, backing, 8 if backing else 0, 16, size, crypt, 1, 1024
    )
    header = header.ljust(72, b"\0") + struct.pack(">Q", features)
    return header.ljust(1024 + 8, b"\0")


def test_a_real_qcow2_has_the_size_qemu_says(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "5M"], check=True, timeout=30)
    content = path.read_bytes()
    assert virtual_size_mib(content[:HEADER_BYTES], len(content), "qcow2") == 5


def test_real_qcow2_files_that_name_other_files_are_refused(tmp_path: Path) -> None:
    base, overlay, external = tmp_path / "base", tmp_path / "overlay", tmp_path / "external"
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*create, str(base), "1M"], check=True, timeout=30)
    subprocess.run([*create, "-b", str(base), "-F", "qcow2", str(overlay)], check=True, timeout=30)
    data = f"data_file={tmp_path / 'data'}"
    subprocess.run([*create, "-o", data, str(external), "1M"], check=True, timeout=30)
    for path, why in ((overlay, "names a backing file"), (external, "external file")):
        content = path.read_bytes()
        with pytest.raises(PpecError, match=why):
            virtual_size_mib(content[:HEADER_BYTES], len(content), "qcow2")


@pytest.mark.parametrize(
    ("content", "claimed", "why"),
    [
        (qcow2(backing=512), "qcow2", "names a backing file"),
        (qcow2(version=2, backing=512), "qcow2", "names a backing file"),
        (qcow2(features=4), "qcow2", "external file"),
        (qcow2(features=2), "qcow2", "corrupt"),
        (qcow2(features=1 << 40), "qcow2", "features we don't know"),
        (qcow2(crypt=2), "qcow2", "encrypted"),
        (qcow2(version=9), "qcow2", "version 9"),
        (qcow2(size=0), "qcow2", "virtual size"),
        (qcow2(size=2**63), "qcow2", "virtual size"),
        (qcow2()[:1024], "qcow2", "cut off"),
        (qcow2()[:40], "qcow2", "no qcow2 header"),
        (RAW, "qcow2", "no qcow2 header"),
        (b"", "qcow2", "no qcow2 header"),
        (qcow2(), "raw", "it is qcow2"),
        (b"KDMV" + bytes(508), "raw", "it is VMDK"),
        (b"\x1f\x8b" + bytes(510), "raw", "it is gzip"),
        (b"<html>not found</html>", "raw", "512-byte sectors"),
        (b"", "raw", "512-byte sectors"),
    ],
)
def test_what_is_not_an_image_we_can_use_is_refused_and_leaves_nothing(
    client: TestClient, services: Services, content: bytes, claimed: str, why: str
) -> None:
    refused = client.put(f"/v1/images/bad?format={claimed}", content=content)
    assert (refused.status_code, refused.json()["code"]) == (422, "image.invalid")
    assert why in refused.json()["detail"]
    assert list(services.settings.images_dir.iterdir()) == []
    assert client.get("/v1/images").json()["items"] == []


def test_every_truncation_of_a_header_is_refused() -> None:
    whole = qcow2()
    for length in range(len(whole)):
        with pytest.raises(PpecError):
            virtual_size_mib(whole[:length][:HEADER_BYTES], length, "qcow2")


def test_an_image_goes_in_and_comes_out(
    client: TestClient, host_client: Callable[[str], TestClient], services: Services
) -> None:
    content = qcow2()
    sha256 = hashlib.sha256(content).hexdigest()
    created = client.put(f"/v1/images/small?format=qcow2&sha256={sha256}", content=content)
    assert created.status_code == 201
    assert created.json() == {
        "name": "small",
        "format": "qcow2",
        "architecture": "x86_64",
        "sha256": sha256,
        "size_bytes": len(content),
        "virtual_size_mib": 4,
    }
    assert client.get("/v1/images/small").json() == created.json()
    assert client.get("/v1/images").json()["items"] == [created.json()]
    path = f"/v1/images/{sha256}/content"
    for fetcher in (client, host_client("h1")):
        fetched = fetcher.get(path)
        assert (fetched.content, fetched.headers["etag"]) == (content, f'"{sha256}"')
    rest = host_client("h1").get(path, headers={"Range": "bytes=1000-"})
    assert (rest.status_code, rest.content) == (206, content[1000:])
    assert services.images.path(sha256).read_bytes() == content
    assert client.delete("/v1/images/small").status_code == 204
    assert client.get(path).json()["code"] == "image.not_found"
    assert list(services.settings.images_dir.iterdir()) == []


def test_nobody_else_fetches_images(client: TestClient, host_client: Callable[[str], TestClient]) -> None:
    sha256 = client.put("/v1/images/small?format=raw", content=RAW).json()["sha256"]
    stranger = host_client("ppec://operator/eve")
    refused = stranger.get(f"/v1/images/{sha256}/content")
    assert (refused.status_code, refused.json()["code"]) == (401, "auth.required")
    assert client.get("/v1/images/..%2F..%2Fppec.db/content").status_code == 404
    assert client.get(f"/v1/images/{'0' * 63}/content").status_code == 422


def test_the_same_again_changes_nothing_and_another_content_is_refused(client: TestClient) -> None:
    assert client.put("/v1/images/small?format=raw", content=RAW).status_code == 201
    assert client.put("/v1/images/small?format=raw", content=RAW).status_code == 200
    other = client.put("/v1/images/small?format=raw", content=RAW * 2)
    assert (other.status_code, other.json()["code"]) == (409, "image.exists")
    early = client.put(f"/v1/images/small?format=raw&sha256={'0' * 64}", content=RAW)
    assert (early.status_code, early.json()["code"]) == (409, "image.exists")
    assert [item["size_bytes"] for item in client.get("/v1/images").json()["items"]] == [1024]


def test_two_names_of_one_content_share_the_file(client: TestClient, services: Services) -> None:
    sha256 = client.put("/v1/images/one?format=raw", content=RAW).json()["sha256"]
    client.put("/v1/images/two?format=raw", content=RAW)
    client.delete("/v1/images/one")
    assert services.images.path(sha256).is_file()
    client.delete("/v1/images/two")
    assert not services.images.path(sha256).exists()


def test_a_wrong_checksum_is_refused_and_leaves_nothing(client: TestClient, services: Services) -> None:
    refused = client.put(f"/v1/images/small?format=raw&sha256={'0' * 64}", content=RAW)
    assert (refused.status_code, refused.json()["code"]) == (409, "image.checksum_mismatch")
    assert list(services.settings.images_dir.iterdir()) == []


@pytest.mark.parametrize("query", ["", "format=vmdk", "format=raw&sha256=zz", "format=raw&architecture=vax"])
def test_a_bad_query_is_refused(client: TestClient, query: str) -> None:
    refused = client.put(f"/v1/images/small?{query}", content=RAW)
    assert (refused.status_code, refused.json()["code"]) == (422, "request.invalid")


def test_an_upload_over_the_limit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", max_bytes=1000)
    upload = store.begin()
    upload.write(bytes(600))
    with pytest.raises(PpecError) as refused:
        upload.write(bytes(600))
    upload.abort()
    assert refused.value.code == "request.too_large"
    assert list((tmp_path / "images").iterdir()) == []
