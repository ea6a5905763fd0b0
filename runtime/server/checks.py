"""What is not generation: scores, receipts, tokens."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llm42c.errors import ConfigError, ContractMismatchError, ReceiptError, RequestError
from llm42c.runtime.contract import Contract
from llm42c.runtime.receipt import Receipt, ReplayResult, compare, contract_result, signature_result
from llm42c.runtime.scoring import scored, scoring_params
from llm42c.runtime.server import chat
from llm42c.runtime.server.errors import ApiError
from llm42c.runtime.server.jobs import Job, named_refusal
from llm42c.runtime.server.schema import DetokenizeRequest, ScoreRequest, TokenizeRequest, VerifyRequest
from llm42c.runtime.server.service import CLIENT_GONE, Service, json_response


async def score(service: Service, body: ScoreRequest, request: Request) -> Response:
    service.check_model(body.model)
    service.jobs.require(body.contract)
    prompts = await service.codec.run(service.prompts, body.prompt, "prompt")
    completions = await service.codec.run(service.prompts, body.completion, "completion", False)
    if len(prompts) != len(completions):
        message = f"{len(prompts)} prompts but {len(completions)} completions"
        raise ApiError(400, message, "completion")
    service.count(len(prompts))

    def make() -> list[Job]:
        return [
            service.jobs.job(ids, scoring_params(given), draft=given, forced=True)
            for ids, given in zip(prompts, completions, strict=True)
        ]

    try:
        outputs = await service.outputs(await service.codec.run(make), request, body.timeout)
    except RequestError as error:
        raise named_refusal(error) from None
    if outputs is None:
        return Response(status_code=CLIENT_GONE)
    data = []
    for i, (given, output) in enumerate(zip(completions, outputs, strict=True)):
        found = scored(output)
        data.append(
            {
                "index": i,
                "token_ids": given,
                "logprobs": found.logprobs,
                "total": found.total,
                "greedy": all(found.greedy),
            }
        )
    tokens = sum(map(len, prompts)), sum(map(len, completions))
    usage = {
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
        "total_tokens": sum(tokens),
    }
    return json_response(
        {
            "object": "list",
            "model": body.model,
            "system_fingerprint": service.contract.hash,
            "data": data,
            "usage": usage,
        }
    )


async def verify(service: Service, body: VerifyRequest, request: Request) -> Response:
    """Do again what a receipt says, its tokens as a draft, and compare."""
    result = await service.codec.run(_read, body, service.contract)
    if isinstance(result, Receipt):
        receipt = result
        try:
            job = service.jobs.job(receipt.prompt, receipt.params, draft=receipt.tokens, fresh=True)
            outputs = await service.outputs([job], request, body.timeout)
        except ContractMismatchError as error:  # of who computes masks
            outputs = []
            result = ReplayResult("another contract", f"another contract: {error}", fields=(str(error),))
        except RequestError as error:
            raise named_refusal(error, "receipt") from None
        if outputs is None:
            return Response(status_code=CLIENT_GONE)
        if outputs:
            result = compare(receipt, outputs[0])
    return json_response(asdict(result))


def _read(body: VerifyRequest, contract: Contract) -> Receipt | ReplayResult:
    """The receipt, or why it need not be done again. Raises ApiError."""
    try:
        receipt = Receipt.from_json(body.receipt)
    except ReceiptError as error:
        return ReplayResult("damaged", str(error))
    refused = None
    if body.public_key is not None:
        try:
            refused = signature_result(receipt, body.public_key)
        except ConfigError as error:
            raise ApiError(501, str(error), "public_key") from None
    return refused or contract_result(receipt, contract) or receipt


async def tokenize(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    if body.model is not None:
        service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", "prompt")
    tokens = await service.codec.run(chat.tokens_of, body, service.codec)
    return {"tokens": tokens, "count": len(tokens), "max_model_len": service.jobs.limits.max_model_len}


async def detokenize(service: Service, body: DetokenizeRequest) -> dict[str, Any]:
    if body.model is not None:
        service.check_model(body.model)
    if any(not 0 <= token < service.jobs.limits.vocab_size for token in body.tokens):
        message = f"tokens must be in [0, {service.jobs.limits.vocab_size})"
        raise ApiError(400, message, "tokens")
    return {"prompt": await service.codec.run(service.codec.decode, body.tokens)}
