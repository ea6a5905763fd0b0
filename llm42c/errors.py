"""Every exception a user of llm42 can meet. One class a mistake; messages say what to do."""

from __future__ import annotations


class Llm42Error(Exception):
    """Base of all errors raised on purpose by llm42."""


class OptionsError(Llm42Error, ValueError):
    """An unknown option, or a value that an option does not take."""


class UnsupportedModelError(Llm42Error, ValueError):
    """The model has a part that llm42 cannot run under its promise."""


class DeviceError(UnsupportedModelError):
    """A device that is not there, or on which nothing can compute the operators."""


class RecompileLimitError(Llm42Error, RuntimeError):
    """torch.compile would run further sizes of a function eagerly."""


class RequestError(Llm42Error, ValueError):
    """A request that cannot be served: empty prompt, too long, token ids out of range, bad sampling."""


class ConfigError(Llm42Error, ValueError):
    """An engine configuration that cannot work, such as a KV budget too small for one request."""


class DeviceTextError(ConfigError):
    """A text from which no device can be read: empty, binary, of two devices, without what a plan needs."""


class ContractMismatchError(RequestError):
    """A request pinned a contract hash that is not this engine's."""


class ContractError(Llm42Error, ValueError):
    """A text that is no contract."""


class ReceiptError(Llm42Error, ValueError):
    """A receipt that was edited, or that another release wrote."""


class StateError(Llm42Error, ValueError):
    """A request's state, or a journal, that was edited or that another release wrote."""


class WeightsError(Llm42Error, ValueError):
    """The model's weights hold NaN or infinity."""


class ModelNotFoundError(Llm42Error, ValueError):
    """MODEL names no folder, no reachable hub id and no installed packaged model."""


class IntegrityError(Llm42Error, RuntimeError):
    """A graph did not give the bits that the promise rests on: the verifier graph is not row independent."""


class RanksDifferError(Llm42Error, RuntimeError):
    """Ranks of one job do not do the same: another graph, contract, or batch. The message names them."""


class RankFailureError(Llm42Error, RuntimeError):
    """A rank died or did not answer in time. The message names it."""
