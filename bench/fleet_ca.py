# SPDX-License-Identifier: Apache-2.0
"""A throw-away fleet CA, for what runs without an orchestrator."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Credential:
    certificate: Path
    key: Path


class FleetCa:
    """`path` is its certificate."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench fleet CA")])
        self.path = folder / "ca.pem"
        self._write(self.path, self._name, self._key.public_key(), x509.BasicConstraints(ca=True, path_length=0))

    def issue(self, identity: str) -> Credential:
        """For a URI such as ``ppec://host/h1``, good on 127.0.0.1 for a day."""
        key = ec.generate_private_key(ec.SECP256R1())
        stem = identity.removeprefix("ppec://").replace("/", "-")
        made = Credential(self._folder / f"{stem}.pem", self._folder / f"{stem}.key")
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity), address])
        self._write(made.certificate, x509.Name([]), key.public_key(), names)
        made.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return made

    def _write(
        self, path: Path, subject: x509.Name, public_key: ec.EllipticCurvePublicKey, extension: x509.ExtensionType
    ) -> None:
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(extension, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
