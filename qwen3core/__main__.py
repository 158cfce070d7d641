"""``python -m qwen3core``: the command, from a checkout that is not installed."""

from .cli import main

raise SystemExit(main())
