"""Signed receipts: a bit anywhere, another key or no signature is named; nobody without the key makes one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_replay import PARAMS, receipt_of
from toy import make_engine

from llm42c.errors import ConfigError, ReceiptError
from llm42c.runtime import sealed
from llm42c.runtime.receipt import KIND, VERSION, Receipt, signature_result
from llm42c.runtime.sampling import SamplingParams
from llm42c.runtime.signing import Signer, read_public_key

pytest.importorskip("cryptography")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pairs of keys: a.pem and a.pub, b.pem and b.pub."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    folder = tmp_path_factory.mktemp("keys")
    for i, name in enumerate("ab"):
        key = Ed25519PrivateKey.from_private_bytes(bytes([i + 1] * 32))
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        (folder / f"{name}.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(public)
    return folder


def signed(keys: Path, name: str = "a") -> Receipt:
    small = receipt_of(SamplingParams(max_tokens=3, ignore_eos=True, logit_bias={3: 0.5}))
    return small.signed(Signer.read(keys / f"{name}.pem"))


def test_a_signed_receipt_is_read_checked_and_replayed(keys: Path) -> None:
    receipt = Receipt.from_json(signed(keys).to_json() + "\n")
    assert receipt == signed(keys)
    assert signature_result(receipt, read_public_key(keys / "a.pub")) is None
    assert make_engine().replay(receipt).verdict == "exact"


def test_a_wrong_key_and_no_signature_are_named(keys: Path) -> None:
    mine, other = (read_public_key(keys / f"{name}.pub") for name in "ab")
    result = signature_result(signed(keys), other)
    assert result is not None
    assert result.verdict == "another key"
    assert mine in result.detail
    assert other in result.detail
    result = signature_result(receipt_of(PARAMS["greedy"]), mine)
    assert result is not None
    assert result.verdict == "unsigned"


def test_every_bit_of_a_signed_receipt_counts(keys: Path) -> None:
    text = signed(keys).to_json().encode()
    for i in range(len(text)):
        for bit in range(8):
            edited = bytes([*text[:i], text[i] ^ (1 << bit), *text[i + 1 :]])
            with pytest.raises(ReceiptError, match="damaged"):
                Receipt.from_json(edited.decode("latin-1"))


def test_an_edit_that_is_sealed_anew_is_noticed_by_the_signature(keys: Path) -> None:
    """Whoever edits a receipt can compute its digest again, but not the signature."""
    key, whole = read_public_key(keys / "a.pub"), signed(keys)
    text = whole.to_json()
    assert json.loads(text)[KIND] == VERSION
    verdicts = []
    for i in range(len(text)):
        for bit in range(7):
            edited = text[:i] + chr(ord(text[i]) ^ (1 << bit)) + text[i + 1 :]
            try:
                values = json.loads(edited)
                del values["sha256"]
                receipt = Receipt.from_json(sealed.seal(KIND, VERSION, values))
            except (ValueError, KeyError, TypeError):  # ReceiptError is a ValueError
                continue
            if receipt == whole:
                continue  # the edit was one of the digest
            result = signature_result(receipt, key)
            assert result is not None, (i, bit)
            verdicts.append(result.verdict)
    assert verdicts.count("damaged") > 300
    assert set(verdicts) == {"damaged", "another key"}


def test_bad_key_files_are_one_line(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    other, locked = tmp_path / "ec.pem", tmp_path / "locked.pem"
    other.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    secret = serialization.BestAvailableEncryption(b"secret")
    locked.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, secret))
    for path, words in (
        (tmp_path / "missing", "cannot read"),
        (keys / "a.pub", "no private key"),
        (locked, "without a passphrase"),
        (other, "no Ed25519 key"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            Signer.read(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no public key"):
        read_public_key(keys / "a.pem")
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(ConfigError, match=r"pip install 'llm42c\[sign\]'"):
        read_public_key(keys / "a.pub")
