# SPDX-License-Identifier: Apache-2.0
"""A fleet CA and its certificates."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path
from typing import Any


class FleetCa:
    """A throw-away fleet CA; `issue` gives the paths of a certificate and its key for one URI identity."""

    def __init__(self, folder: Path) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fleet CA")])
        self.path = folder / "ca.pem"
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        self._write(self.path, self._name, self._key.public_key(), [constraints])

    def issue(self, identity: str, *, days: float = 1) -> tuple[Path, Path]:
        """Good for `days` from now; one that ended earlier has a negative number of them."""
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        names = x509.SubjectAlternativeName(
            [x509.UniformResourceIdentifier(identity), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        )
        stem = identity.removeprefix("ppec://").replace("/", "-")
        certificate, key_path = self._folder / f"{stem}.pem", self._folder / f"{stem}.key"
        self._write(certificate, x509.Name([]), key.public_key(), [names], days)
        pem, pkcs8, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        key_path.write_bytes(key.private_bytes(pem, pkcs8, plain))
        return certificate, key_path

    def _write(self, path: Path, subject: Any, public_key: Any, extensions: list[Any], days: float = 1) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization

        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(public_key)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(1))
        builder = builder.not_valid_after(now + datetime.timedelta(days))
        for extension in extensions:
            builder = builder.add_extension(extension, critical=True)
        path.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
