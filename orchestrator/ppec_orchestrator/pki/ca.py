# SPDX-License-Identifier: Apache-2.0
"""The fleet CA: made at first start, it certifies hosts, the orchestrator and operators.

A certificate's names come from the orchestrator's record, never from the request: a host can't name itself another.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ppec_contract.errors import PpecError
from ppec_contract.identity import Identity
from ppec_orchestrator.pki.keys import key_pem, load_key, new_key, requested_key, write_private
from ppec_orchestrator.pki.names import alternative_names

CA_LIFETIME = timedelta(days=3650)
LIFETIME = timedelta(days=397)
RENEW_BEFORE = timedelta(days=30)
# A peer's clock may be behind ours by this much and still accept a certificate just issued.
CLOCK_SKEW = timedelta(hours=1)
ORCHESTRATOR = Identity("orchestrator", "main")
_USAGES = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
_CLIENT_ONLY = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate as it is recorded and handed out. `serial` is hexadecimal."""

    pem: str
    serial: str
    uri: str
    not_before: datetime
    not_after: datetime


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Where a certificate, its key (0600) and the CA certificate lie."""

    certificate_path: Path
    key_path: Path
    ca_path: Path


class FleetCa:
    """The CA of one fleet, kept in `folder` (0700): `ca.crt`, `ca.key`, `orchestrator.crt`, `orchestrator.key`."""

    def __init__(self, folder: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._folder = folder
        self._key = key
        self._certificate = certificate

    @classmethod
    def open(cls, folder: Path, *, now: datetime) -> FleetCa:
        """The CA in `folder`, made if there is none. Raises `internal.error` when its files don't belong together."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder):
            if not (folder / "ca.crt").exists():
                _create_ca(folder, now)
            try:
                key = load_key((folder / "ca.key").read_bytes())
                certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
            except (OSError, ValueError, TypeError) as error:
                raise _broken(folder, "they can't be read") from error
        if certificate.public_key() != key.public_key():
            raise _broken(folder, "key and certificate don't match")
        return cls(folder, key, certificate)

    @property
    def ca_pem(self) -> str:
        return self._certificate.public_bytes(Encoding.PEM).decode("ascii")

    @property
    def orchestrator_pair(self) -> KeyPair:
        """The orchestrator's server and client certificate; there after `ensure_orchestrator`."""
        return KeyPair(self._folder / "orchestrator.crt", self._folder / "orchestrator.key", self._folder / "ca.crt")

    def issue_host(self, csr_pem: str, host: str, address: str, *, now: datetime) -> Issued:
        """For the host of the record, reached by `address`; of the request only its public key counts."""
        names = alternative_names(Identity("host", host), [address])
        return self._issue(requested_key(csr_pem), names, _USAGES, now)

    def issue_operator(self, name: str, *, now: datetime) -> tuple[Issued, bytes]:
        """A client certificate for a person or playbook, with a new private key (PEM)."""
        key = new_key()
        names = alternative_names(Identity.from_uri(f"ppec://operator/{name}"))
        return self._issue(key.public_key(), names, _CLIENT_ONLY, now), key_pem(key)

    def ensure_orchestrator(self, reached_by: Iterable[str], *, now: datetime) -> Issued | None:
        """Issues the orchestrator's certificate if there is none, its names changed or it ends soon."""
        names = alternative_names(ORCHESTRATOR, reached_by)
        pair = self.orchestrator_pair
        with _locked(self._folder):
            if _still_good(pair, names, self._certificate, now):
                return None
            key = new_key()
            issued = self._issue(key.public_key(), names, _USAGES, now)
            write_private(pair.key_path, key_pem(key))
            write_private(pair.certificate_path, issued.pem.encode("ascii"))
        return issued

    def _issue(
        self,
        public_key: CertificatePublicKeyTypes,
        names: x509.SubjectAlternativeName,
        usages: x509.ExtendedKeyUsage,
        now: datetime,
    ) -> Issued:
        uri = names.get_values_for_type(x509.UniformResourceIdentifier)[0]
        not_after = min(now + LIFETIME, self._certificate.not_valid_after_utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(uri.rpartition("/")[2]))
            .issuer_name(self._certificate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(usages, critical=False)
            .add_extension(names, critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        certificate = builder.sign(self._key, hashes.SHA256())
        return Issued(
            pem=certificate.public_bytes(Encoding.PEM).decode("ascii"),
            serial=f"{certificate.serial_number:x}",
            uri=uri,
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
        )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _create_ca(folder: Path, now: datetime) -> None:
    key = new_key()
    name = _name("PPEC fleet CA")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now.astimezone(UTC) - CLOCK_SKEW)
        .not_valid_after(now.astimezone(UTC) + CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    # The certificate last: its presence says that the CA is complete.
    write_private(folder / "ca.key", key_pem(key))
    write_private(folder / "ca.crt", certificate.public_bytes(Encoding.PEM))


def _still_good(pair: KeyPair, names: x509.SubjectAlternativeName, ca: x509.Certificate, now: datetime) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(pair.certificate_path.read_bytes())
        key = load_key(pair.key_path.read_bytes())
        certificate.verify_directly_issued_by(ca)
        present = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except Exception:  # Unreadable, of another CA or of another shape: whatever it is, it is replaced.
        return False
    ends_late_enough = certificate.not_valid_after_utc - now > RENEW_BEFORE
    return certificate.public_key() == key.public_key() and present == names and ends_late_enough


def _broken(folder: Path, why: str) -> PpecError:
    return PpecError(
        "internal.error",
        f"the fleet CA's files in {folder} can't be used: {why}",
        hint="Restore ca.key and ca.crt from a backup; a new CA means enrolling every host again.",
        subject="fleet CA",
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps two starting processes from making two CAs."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
