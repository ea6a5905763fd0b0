"""Ed25519 signatures through the package `cryptography`, which is asked for only here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm42c.errors import ConfigError


class Signer:
    """A private key."""

    def __init__(self, key: Any) -> None:
        self._key = key
        self.public_key: str = key.public_key().public_bytes_raw().hex()  # 64 hex digits

    @staticmethod
    def read(path: Path) -> Signer:
        """The key of a PEM file without a passphrase. Raises ConfigError for anything else."""
        ed25519, serialization = _cryptography()
        try:
            key = serialization.load_pem_private_key(_bytes(path), None)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} is no private key in PEM without a passphrase: {error}") from None
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise ConfigError(
                f"{path} is no Ed25519 key; make one with: openssl genpkey -algorithm ed25519 -out {path}"
            )
        return Signer(key)

    def sign(self, data: bytes) -> str:
        """128 hex digits."""
        signature: bytes = self._key.sign(data)
        return signature.hex()


def read_public_key(path: Path) -> str:
    """64 hex digits, of a PEM file. Raises ConfigError for anything else."""
    ed25519, serialization = _cryptography()
    try:
        key = serialization.load_pem_public_key(_bytes(path))
    except ValueError as error:
        raise ConfigError(f"{path} is no public key in PEM: {error}") from None
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise ConfigError(f"{path} is no Ed25519 key")
    digits: str = key.public_bytes_raw().hex()
    return digits


def is_signed(data: bytes, signature: str, public_key: str) -> bool:
    """Whether `signature` of `data` was made with the private half of `public_key`; both in hex."""
    from cryptography.exceptions import InvalidSignature

    ed25519, _ = _cryptography()
    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
        key.verify(bytes.fromhex(signature), data)
    except (InvalidSignature, ValueError):
        return False
    return bytes.fromhex(signature).hex() == signature  # in one spelling


def _cryptography() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ConfigError("signatures need the package cryptography: pip install 'llm42c[sign]'") from None
    return ed25519, serialization


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
