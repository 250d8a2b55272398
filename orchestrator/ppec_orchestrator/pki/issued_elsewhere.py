# SPDX-License-Identifier: Apache-2.0
"""Host certificates that the fleet CA issued outside the orchestrator, read before they are recorded as its own."""

from __future__ import annotations

from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from ppec_contract.errors import PpecError
from ppec_contract.identity import Identity
from ppec_orchestrator.pki.ca import Issued

_LONGEST_SERIAL_BITS = 160


def read_host_certificate(pem: bytes, ca_pem: str, *, now: datetime) -> tuple[Issued, Identity]:
    """The first certificate of `pem` (the one that TLS shows) and the host it is of.

    Raises `request.invalid` unless it is readable, issued by the CA itself and in date; `auth.wrong_identity` unless
    it names exactly one PPEC identity, and that a host's.
    """
    try:
        certificate = x509.load_pem_x509_certificates(pem)[0]
        serial = certificate.serial_number
        extensions = certificate.extensions
    except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension) as error:
        raise _unusable("it is not a PEM certificate we can read") from error
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_pem.encode("ascii")))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError) as error:
        raise _unusable(
            "this fleet's CA did not issue it", "Issue it with the CA in the state folder's pki."
        ) from error
    if not 0 < serial < 1 << _LONGEST_SERIAL_BITS:
        raise _unusable("its serial is not a positive number of at most 20 bytes")
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begins <= now < ends:
        raise _unusable(f"it is good from {begins:%F %T} to {ends:%F %T} UTC, and now it is {now:%F %T}")
    identity = _host_identity(extensions)
    shown = certificate.public_bytes(Encoding.PEM).decode("ascii")
    return Issued(pem=shown, serial=f"{serial:x}", uri=identity.uri, not_before=begins, not_after=ends), identity


def _host_identity(extensions: x509.Extensions) -> Identity:
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        uris = []
    else:
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    identity = Identity.from_peer_certificate({"subjectAltName": tuple(("URI", uri) for uri in uris)})
    if identity.role != "host":
        raise PpecError(
            "auth.wrong_identity",
            f"the certificate is {identity.uri}, wanted ppec://host/<name>",
            hint="Only hosts' certificates have to be recorded.",
            subject="certificate",
        )
    return identity


def _unusable(why: str, hint: str = "") -> PpecError:
    return PpecError("request.invalid", f"the certificate can't be recorded: {why}", hint=hint, subject="certificate")
