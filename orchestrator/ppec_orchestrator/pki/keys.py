# SPDX-License-Identifier: Apache-2.0
"""Private keys and their files (0600, written whole by rename), and what public keys we certify."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

from ppec_contract.errors import PpecError

_CURVES = (ec.SECP256R1, ec.SECP384R1)
_MIN_RSA_BITS, _MAX_RSA_BITS = 2048, 8192


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("the key is not an elliptic curve key")
    return key


def requested_key(csr_pem: str) -> CertificatePublicKeyTypes:
    """The public key of a signing request whose sender holds the private one. Nothing else of it is used."""
    try:
        csr = x509.load_pem_x509_csr(csr_pem.encode("ascii"))
        if not csr.is_signature_valid:
            raise _bad_request("its signature does not match its key")
        key = csr.public_key()
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise _bad_request("it is not a PEM signing request we can read") from error
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES):
        return key
    if isinstance(key, rsa.RSAPublicKey) and _MIN_RSA_BITS <= key.key_size <= _MAX_RSA_BITS:
        return key
    raise _bad_request("its key is neither P-256, P-384, Ed25519 nor RSA of 2048 bits or more")


def _bad_request(why: str) -> PpecError:
    return PpecError(
        "request.invalid",
        f"the certificate signing request can't be used: {why}",
        hint="Make one with `openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256`.",
        subject="csr_pem",
    )


def write_private(path: Path, content: bytes) -> None:
    """Replaces `path` by a file with mode 0600; a crash leaves the old file or the new one, never half of one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
