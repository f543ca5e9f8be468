"""HTTPS: the certificate of a server, checked before anything is loaded."""

from __future__ import annotations

import ssl
from pathlib import Path

from paceline.errors import RequestError


def server_context(certfile: Path, keyfile: Path | None) -> ssl.SSLContext:
    """Return the TLS context of a server.

    Args:
        certfile: PEM file with the certificate and those between it and its authority.
        keyfile: PEM file with the private key; None: it is in `certfile`.

    Raises:
        RequestError: a file cannot be read, is not PEM, is encrypted, or the two do not match.
    """
    files = {"ssl_certfile": certfile, "ssl_keyfile": keyfile or certfile}
    for name, path in files.items():
        try:
            text = path.read_bytes()
        except OSError as error:
            raise RequestError(f"cannot read {name} {path}: {error.strerror}") from None
        kind = b"CERTIFICATE-----" if name == "ssl_certfile" else b"PRIVATE KEY-----"
        if b"-----BEGIN " not in text or kind not in text:
            what = "certificate" if name == "ssl_certfile" else "private key"
            raise RequestError(f"{name} {path} has no {what}, expected one in PEM form")
        if name == "ssl_keyfile" and b"ENCRYPTED" in text:
            raise RequestError(f"{name} {path} is encrypted; decrypt it, e.g. with openssl pkey")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certfile, keyfile, password=lambda: "")
    except ssl.SSLError as error:
        if "MISMATCH" in str(error):
            raise RequestError(
                f"the key in {files['ssl_keyfile']} is not that of the certificate in {certfile}"
            ) from None
        reason = error.reason or "it is damaged"
        raise RequestError(
            f"the certificate in {certfile} and its key cannot be used: "
            f"{reason.lower().replace('_', ' ')}"
        ) from None
    return context
