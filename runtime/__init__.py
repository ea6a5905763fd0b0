"""Requests, scheduler, paged KV, packed batches, sampler, verifier and certificates.

Loggers are named after their modules (``llm42c.runtime.engine``, …) and silent until the application
installs a handler: INFO tells of engines, certificates and preemptions, WARNING of what work goes on without,
ERROR of a revoked certificate.
"""

import logging

logging.getLogger(__name__).addHandler(logging.NullHandler())
