"""`python -m llm42c` is the `llm42` command."""

import sys

from llm42c.cli import main

sys.exit(main())
